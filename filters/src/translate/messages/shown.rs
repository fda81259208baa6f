//! Things that chat has no word for, shown as text between tags: every model reads that, and what is in it can be told
//! apart again. A text inside cannot end its own tags: if it holds them, others are used.

use protocol::chat::Part;

/// A kind of thing: its name, and the names of what is said of it before its content.
pub(super) struct Kind {
    pub(super) name: &'static str,
    pub(super) fields: &'static [&'static str],
}

pub(super) const DOCUMENT: Kind = Kind {
    name: "document",
    fields: &["title", "context"],
};

pub(super) const SEARCH_RESULT: Kind = Kind {
    name: "search_result",
    fields: &["title", "source"],
};

/// What a tool answered when it failed.
pub(super) const ERROR: Kind = Kind {
    name: "error",
    fields: &[],
};

/// Where an image stood that could not stay there. Its content is a number, under which the image follows.
pub(super) const IMAGE: Kind = Kind {
    name: "image",
    fields: &[],
};

/// Whether blocks of content stay apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// One part for tags and text.
    Whole,
    /// A part for what comes before the content, one for each block of it, and one for the end.
    Blocks,
}

impl Kind {
    /// `content` between tags, after `fields`, which are those of this kind in their order.
    pub(super) fn show(
        &self,
        fields: &[Option<&str>],
        content: Vec<Part>,
        form: Form,
    ) -> Vec<Part> {
        let within = fields.iter().copied().flatten().chain(texts(&content));
        let tags = self.tags(within.collect());
        let mut open = tags.open(self.name);
        open.push('\n');
        for (name, text) in self.fields.iter().zip(fields) {
            if let Some(text) = text {
                open += &format!("{}{text}{}\n", tags.open(name), tags.close(name));
            }
        }
        let close = tags.close(self.name);
        match form {
            Form::Whole => {
                for text in texts(&content) {
                    open.reserve(text.len() + close.len() + 1);
                    open += text;
                    open.push('\n');
                }
                vec![text(open + &close)]
            }
            Form::Blocks => {
                let content = content.into_iter().map(|part| match part {
                    Part::Text { text: within } => text(within + "\n"),
                    image => image,
                });
                std::iter::once(text(open))
                    .chain(content)
                    .chain([text(close)])
                    .collect()
            }
        }
    }

    /// Tags that stand in none of the texts `within`.
    pub(super) fn tags(&self, within: Vec<&str>) -> Tags {
        let mut tags = Tags { number: 1 };
        let names = || self.fields.iter().chain([&self.name]);
        while names().any(|name| {
            let tag = tags.open(name);
            within.iter().any(|text| text.contains(&tag[1..])) // its end's too
        }) {
            tags.number += 1;
        }
        tags
    }
}

/// How tags are written: by their name alone, or with a number after it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tags {
    pub(super) number: u32,
}

impl Tags {
    pub(super) fn open(self, name: &str) -> String {
        match self.number {
            1 => format!("<{name}>"),
            number => format!("<{name}_{number}>"),
        }
    }

    pub(super) fn close(self, name: &str) -> String {
        self.open(name).replacen('<', "</", 1)
    }
}

pub(super) fn text(text: String) -> Part {
    Part::Text { text }
}

pub(super) fn texts(parts: &[Part]) -> impl Iterator<Item = &str> {
    parts.iter().filter_map(|part| match part {
        Part::Text { text } => Some(text.as_str()),
        Part::ImageUrl { .. } => None,
    })
}
