//! Messages request → chat request.

use super::fields;
use super::shown::{self, Form};
use super::wire::{
    Block, Blocks, InputMessage, InputTool, MessagesRequest, OutputConfig, OutputFormat, Source,
    Text, TextOr, Thinking, ToolChoice,
};
use protocol::ApiError;
use protocol::chat::{
    ChatRequest, Content, FunctionCall, FunctionDefinition, ImageUrl, Message, Part, StopStrings,
    StreamOptions, ThinkingBlock, Tool, ToolCall,
};
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

/// The chat request that asks for the same answer.
pub(super) fn to_chat(request: MessagesRequest<'_>) -> Result<ChatRequest, ApiError> {
    if request.max_tokens.is_none() {
        return Err(missing("max_tokens"));
    }
    let turns = request.messages.as_deref().unwrap_or_default();
    if turns
        .last()
        .is_some_and(|turn| turn.role.as_str() == "assistant")
    {
        return Err(refused(
            format!("messages.{}", turns.len() - 1),
            "the last turn is the assistant's, and answers are begun here, not continued",
        ));
    }
    let stream = request.stream.unwrap_or(false);
    Ok(ChatRequest {
        stream: stream.then_some(true),
        stream_options: stream.then_some(StreamOptions {
            include_usage: true,
        }),
        ..prompt(request)?
    })
}

/// The request for the prompt alone, as a node's `/tokenize` takes it.
pub(super) fn to_tokenize(request: MessagesRequest<'_>) -> Result<ChatRequest, ApiError> {
    let chat = prompt(request)?;
    let unused = chat
        .tool_choice
        .as_ref()
        .is_some_and(|choice| choice == "none");
    Ok(ChatRequest {
        model: chat.model,
        messages: chat.messages,
        tools: chat.tools.filter(|_| !unused), // a model that may not call is told of no tools
        chat_template_kwargs: chat.chat_template_kwargs,
        extra: Map::from_iter([("add_generation_prompt".into(), true.into())]),
        ..ChatRequest::default()
    })
}

/// Everything but how the answer is to be sent.
fn prompt(request: MessagesRequest<'_>) -> Result<ChatRequest, ApiError> {
    let mut extra = fields::pass_on(request.extra)?;
    let turns = request.messages.ok_or_else(|| missing("messages"))?;
    let mut messages = Vec::with_capacity(turns.len() + 1);
    if let Some(system) = request.system {
        let text = text_of(system, "system")?;
        messages.push(message("system", Some(Content::Text(text))));
    }
    for (index, turn) in turns.into_iter().enumerate() {
        add_turn(&mut messages, turn, &format!("messages.{index}"))?;
    }
    let (tool_choice, one_call) = match request.tool_choice {
        None => (None, false),
        Some(choice) => choose(choice),
    };
    let OutputConfig { effort, format } = request.output_config.unwrap_or(OutputConfig {
        effort: None,
        format: None,
    });
    let held_to = match (format, request.output_format) {
        (Some(format), _) => Some(response_format(format, "output_config.format")?),
        (None, Some(format)) => Some(response_format(format, "output_format")?),
        (None, None) => None,
    };
    extra.extend(held_to.map(|format| ("response_format".into(), format)));
    let effort = effort.map(reasoning_effort).transpose()?;
    let thinking = request.thinking.map(think).transpose()?;
    if let Some((_, Some(budget))) = thinking {
        extra.insert("thinking_budget".into(), budget.into());
    }
    // an effort alone asks for thinking as well
    let thinks = thinking.map(|(on, _)| on).or(effort.as_ref().map(|_| true));
    Ok(ChatRequest {
        model: request.model.into_owned(),
        messages,
        max_tokens: request.max_tokens,
        temperature: request.temperature,
        top_p: request.top_p,
        top_k: request.top_k,
        stop: request
            .stop_sequences
            .filter(|stop| !stop.is_empty())
            .map(StopStrings::Many),
        tools: request
            .tools
            .filter(|tools| !tools.is_empty())
            .map(define)
            .transpose()?,
        tool_choice,
        parallel_tool_calls: one_call.then_some(false),
        reasoning_effort: effort,
        chat_template_kwargs: thinks
            .map(|on| Map::from_iter([("enable_thinking".into(), on.into())])),
        user: request.metadata.and_then(|metadata| metadata.user_id),
        extra,
        ..ChatRequest::default()
    })
}

fn message(role: &str, content: Option<Content>) -> Message {
    Message {
        role: role.into(),
        content,
        ..Message::default()
    }
}

/// One turn becomes one message, or several when it holds tool results: each of those is a message of its own.
fn add_turn(messages: &mut Vec<Message>, turn: InputMessage<'_>, at: &str) -> Result<(), ApiError> {
    let role = match turn.role.as_str() {
        "developer" => "system",
        role @ ("user" | "assistant" | "system") => role,
        role => {
            return Err(refused(
                format!("{at}.role"),
                format!("must be `user`, `assistant` or `system`, not `{role}`"),
            ));
        }
    };
    match turn.content {
        None => messages.push(message(role, None)),
        Some(TextOr::Text(text)) => {
            messages.push(message(role, Some(Content::Text(text.into_owned()))));
        }
        Some(blocks) if role == "system" => {
            let text = text_of(blocks, &format!("{at}.content"))?;
            messages.push(message(role, Some(Content::Text(text))));
        }
        Some(TextOr::Other(blocks)) if role == "assistant" => {
            messages.push(assistant(blocks, at)?);
        }
        Some(TextOr::Other(blocks)) => add_user(messages, blocks, at)?,
    }
    Ok(())
}

fn add_user(messages: &mut Vec<Message>, blocks: Vec<Block<'_>>, at: &str) -> Result<(), ApiError> {
    let mut pieces: Vec<Piece> = Vec::new();
    for (index, block) in blocks.into_iter().enumerate() {
        let at = format!("{at}.content.{index}");
        if block.kind.as_str() == "tool_result" {
            pieces.push(tool_result(block, &at)?);
        } else {
            match pieces.last_mut() {
                Some(Piece::Own(parts)) => add_part(block, &at, parts)?,
                _ => {
                    let mut parts = Vec::new();
                    add_part(block, &at, &mut parts)?;
                    pieces.push(Piece::Own(parts));
                }
            }
        }
    }
    messages.extend(with_images_moved(pieces).into_iter().map(Piece::message));
    Ok(())
}

/// What a user's turn falls into: results, each of which is a message of its own, and what stands between them.
enum Piece {
    Own(Vec<Part>),
    Result {
        call: String,
        failed: bool,
        parts: Vec<Part>,
    },
}

impl Piece {
    fn parts(&self) -> &[Part] {
        match self {
            Self::Own(parts) | Self::Result { parts, .. } => parts,
        }
    }

    fn message(self) -> Message {
        match self {
            Self::Own(parts) => message("user", Some(Content::Parts(parts))),
            Self::Result {
                call,
                failed,
                mut parts,
            } => {
                if failed {
                    // chat has no flag for it, and the model must know
                    let form = match parts.len() {
                        0 | 1 => Form::Whole,
                        _ => Form::Blocks,
                    };
                    parts = shown::ERROR.show(&[], parts, form);
                }
                let content = text_content(parts).unwrap_or_else(|| Content::Text(String::new()));
                Message {
                    tool_call_id: Some(call),
                    ..message("tool", Some(content))
                }
            }
        }
    }
}

/// A tool message has only text: images of results follow behind the last of them, as the user's. A number tells where
/// each of them stood.
fn with_images_moved(pieces: Vec<Piece>) -> Vec<Piece> {
    let is_image = |part: &Part| matches!(part, Part::ImageUrl { .. });
    let of_result = |piece: &Piece| matches!(piece, Piece::Result { .. });
    let shows = |piece: &Piece| of_result(piece) && piece.parts().iter().any(is_image);
    if !pieces.iter().any(shows) {
        return pieces;
    }
    let all = pieces.iter().flat_map(|piece| shown::texts(piece.parts()));
    let tags = shown::IMAGE.tags(all.collect());
    let mut count = 0;
    let mut place = || {
        count += 1;
        let name = shown::IMAGE.name;
        format!("{}{count}{}", tags.open(name), tags.close(name))
    };
    let mut moved = Vec::new(); // images with their numbers, before a piece of the user's own
    let mut all = Vec::with_capacity(pieces.len() + 1);
    for mut piece in pieces {
        match &mut piece {
            Piece::Own(parts) => drop(parts.splice(..0, moved.drain(..))),
            Piece::Result { parts, .. } => {
                for part in parts.iter_mut().filter(|part| is_image(part)) {
                    let place = place();
                    let image = std::mem::replace(part, shown::text(place.clone()));
                    moved.extend([shown::text(place), image]);
                }
            }
        }
        all.push(piece);
    }
    all.extend((!moved.is_empty()).then_some(Piece::Own(moved)));
    all
}

fn assistant(blocks: Vec<Block<'_>>, at: &str) -> Result<Message, ApiError> {
    let (mut texts, mut thinking, mut calls) = (Vec::new(), Vec::new(), Vec::new());
    for (index, block) in blocks.into_iter().enumerate() {
        let at = format!("{at}.content.{index}");
        match block.kind.as_str() {
            "text" => texts.push(shown::text(need(block.text, &at, "text")?.into_owned())),
            "thinking" => thinking.push(ThinkingBlock {
                kind: "thinking".into(),
                thinking: Some(need(block.thinking, &at, "thinking")?.into_owned()),
                signature: Some(block.signature.map(Text::into_owned).unwrap_or_default()),
                data: None,
            }),
            // encrypted for its vendor's own models: no model here can read it, but it stays in its place
            "redacted_thinking" => thinking.push(ThinkingBlock {
                kind: "redacted_thinking".into(),
                data: Some(need(block.data, &at, "data")?.into_owned()),
                ..ThinkingBlock::default()
            }),
            "tool_use" => calls.push(call(block, &at)?),
            kind => return Err(unsupported(kind, &at)),
        }
    }
    let (reasoning_content, thinking_blocks) = thought(thinking);
    Ok(Message {
        reasoning_content,
        thinking_blocks,
        tool_calls: (!calls.is_empty()).then_some(calls),
        ..message("assistant", text_content(texts))
    })
}

/// Thinking as one text, and in its blocks where the text does not say all that is in them.
fn thought(mut blocks: Vec<ThinkingBlock>) -> (Option<String>, Option<Vec<ThinkingBlock>>) {
    if let [block] = &mut blocks[..]
        && block.signature.as_deref() == Some("")
        && block.thinking.as_deref() != Some("")
    {
        return (block.thinking.take(), None);
    }
    let text: String = blocks
        .iter()
        .filter_map(|block| block.thinking.as_deref())
        .collect();
    let text = (!text.is_empty()).then_some(text);
    (text, (!blocks.is_empty()).then_some(blocks))
}

/// One text as it is; several stay apart, as parts.
fn text_content(mut parts: Vec<Part>) -> Option<Content> {
    if parts.len() > 1 {
        return Some(Content::Parts(parts));
    }
    match parts.pop()? {
        Part::Text { text } => Some(Content::Text(text)),
        image => Some(Content::Parts(vec![image])),
    }
}

fn call(block: Block<'_>, at: &str) -> Result<ToolCall, ApiError> {
    if block.toolset_name.is_some() {
        return Err(refused(
            format!("{at}.toolset_name"),
            "toolsets run on their vendor's servers",
        ));
    }
    Ok(ToolCall {
        id: need(block.id, at, "id")?.into_owned(),
        kind: "function".into(),
        function: FunctionCall {
            name: need(block.name, at, "name")?.into_owned(),
            arguments: arguments(block.input, at)?,
        },
    })
}

/// The input as it was written, but for spaces. Some clients put the object into a string, and some send nothing.
fn arguments(input: Option<&RawValue>, at: &str) -> Result<String, ApiError> {
    let raw = input.map_or("{}", RawValue::get);
    let unwrapped = match raw.as_bytes().first() {
        Some(b'{') => return Ok(compact(raw)),
        Some(b'"') => serde_json::from_str::<String>(raw).ok(),
        _ => None,
    };
    unwrapped
        .filter(|text| serde_json::from_str::<Map<String, Value>>(text).is_ok())
        .ok_or_else(|| refused(format!("{at}.input"), "must be an object"))
}

/// Valid JSON without the spaces around its values, which stay as they are to the last digit.
fn compact(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    let (mut quoted, mut escaped) = (false, false);
    text.extend(json.chars().filter(|c| {
        match *c {
            '"' if !escaped => quoted = !quoted,
            ' ' | '\n' | '\r' | '\t' if !quoted => return false,
            _ => {}
        }
        escaped = quoted && *c == '\\' && !escaped;
        true
    }));
    text
}

fn tool_result(block: Block<'_>, at: &str) -> Result<Piece, ApiError> {
    let mut parts = Vec::new();
    match block.content {
        None => {}
        Some(TextOr::Text(text)) => parts.push(shown::text(text.into_owned())),
        Some(TextOr::Other(blocks)) => {
            for (index, block) in blocks.into_iter().enumerate() {
                add_part(block, &format!("{at}.content.{index}"), &mut parts)?;
            }
        }
    }
    Ok(Piece::Result {
        call: need(block.tool_use_id, at, "tool_use_id")?.into_owned(),
        failed: block.is_error == Some(true),
        parts,
    })
}

/// What a user shows: text, images, and what can be written as text.
fn add_part(block: Block<'_>, at: &str, parts: &mut Vec<Part>) -> Result<(), ApiError> {
    match block.kind.as_str() {
        "text" => {
            let text = need(block.text, at, "text")?.into_owned();
            parts.push(Part::Text { text });
        }
        "image" => {
            if block.transformations.is_some_and(|raw| raw.get() != "{}") {
                return Err(refused(
                    format!("{at}.transformations"),
                    "images are handed on as they are",
                ));
            }
            match block.source {
                Some(TextOr::Other(source)) => parts.push(image(source, at)?),
                _ => return Err(missing(format!("{at}.source"))),
            }
        }
        "document" => add_document(block, at, parts)?,
        "search_result" => add_search_result(block, at, parts)?,
        kind => return Err(unsupported(kind, at)),
    }
    Ok(())
}

fn image(source: Source<'_>, at: &str) -> Result<Part, ApiError> {
    let at = format!("{at}.source");
    let url = match source.kind.as_str() {
        "base64" => {
            let media_type = need(source.media_type, &at, "media_type")?;
            let data = need(source.data, &at, "data")?;
            ["data:", media_type.as_str(), ";base64,", data.as_str()].concat()
        }
        "url" => need(source.url, &at, "url")?.into_owned(),
        kind => return Err(not_stored(kind, &at)),
    };
    Ok(Part::ImageUrl {
        image_url: ImageUrl { url, detail: None },
    })
}

/// Chat has no documents: one is shown as text, with its images where they stand in it.
fn add_document(block: Block<'_>, at: &str, parts: &mut Vec<Part>) -> Result<(), ApiError> {
    refuse_citations(block.citations, at)?;
    let Some(TextOr::Other(source)) = block.source else {
        return Err(missing(format!("{at}.source")));
    };
    let at = format!("{at}.source");
    let (content, form) = match (source.kind.as_str(), source.content) {
        ("text", _) => {
            let text = need(source.data, &at, "data")?;
            (vec![shown::text(text.into_owned())], Form::Whole)
        }
        ("content", Some(TextOr::Text(text))) => {
            (vec![shown::text(text.into_owned())], Form::Blocks)
        }
        ("content", Some(TextOr::Other(blocks))) => {
            let mut content = Vec::with_capacity(blocks.len());
            for (index, block) in blocks.into_iter().enumerate() {
                let at = format!("{at}.content.{index}");
                match block.kind.as_str() {
                    "text" | "image" => add_part(block, &at, &mut content)?,
                    kind => return Err(unsupported(kind, &at)),
                }
            }
            (content, Form::Blocks)
        }
        ("content", None) => return Err(missing(format!("{at}.content"))),
        ("base64" | "url", _) => {
            return Err(refused(at, "PDFs cannot be read here; send their text"));
        }
        (kind, _) => return Err(not_stored(kind, &at)),
    };
    let fields = [&block.title, &block.context].map(|text| text.as_ref().map(Text::as_str));
    parts.extend(shown::DOCUMENT.show(&fields, content, form));
    Ok(())
}

fn add_search_result(block: Block<'_>, at: &str, parts: &mut Vec<Part>) -> Result<(), ApiError> {
    refuse_citations(block.citations, at)?;
    let Some(TextOr::Text(source)) = &block.source else {
        return Err(missing(format!("{at}.source")));
    };
    let mut content = Vec::new();
    match block.content {
        None => {}
        Some(TextOr::Text(text)) => content.push(shown::text(text.into_owned())),
        Some(TextOr::Other(blocks)) => {
            for (index, block) in blocks.into_iter().enumerate() {
                let at = format!("{at}.content.{index}");
                match block.kind.as_str() {
                    "text" => add_part(block, &at, &mut content)?,
                    kind => return Err(unsupported(kind, &at)),
                }
            }
        }
    }
    let form = match content.len() {
        0 | 1 => Form::Whole,
        _ => Form::Blocks,
    };
    let fields = [
        block.title.as_ref().map(Text::as_str),
        Some(source.as_str()),
    ];
    parts.extend(shown::SEARCH_RESULT.show(&fields, content, form));
    Ok(())
}

fn refuse_citations(citations: Option<&RawValue>, at: &str) -> Result<(), ApiError> {
    #[derive(Deserialize)]
    struct Citations {
        #[serde(default)]
        enabled: Option<bool>,
    }
    let wanted = citations
        .and_then(|raw| serde_json::from_str::<Citations>(raw.get()).ok())
        .is_some_and(|citations| citations.enabled == Some(true));
    if wanted {
        return Err(refused(
            format!("{at}.citations"),
            "answers here cite nothing",
        ));
    }
    Ok(())
}

fn text_of(blocks: Blocks<'_>, at: &str) -> Result<String, ApiError> {
    match blocks {
        TextOr::Text(text) => Ok(text.into_owned()),
        TextOr::Other(blocks) => blocks
            .into_iter()
            .enumerate()
            .map(|(index, block)| match (block.kind.as_str(), block.text) {
                ("text", Some(text)) => Ok(text.into_owned()),
                _ => Err(refused(format!("{at}.{index}"), "must be a text block")),
            })
            .collect::<Result<Vec<_>, _>>()
            .map(|texts| texts.join("\n")),
    }
}

fn refused(at: impl Into<String>, why: impl std::fmt::Display) -> ApiError {
    let at = at.into();
    let message = format!("{at}: {why}");
    ApiError::invalid(at, message)
}

fn missing(at: impl Into<String>) -> ApiError {
    refused(at, "is missing")
}

fn need<T>(value: Option<T>, at: &str, name: &str) -> Result<T, ApiError> {
    value.ok_or_else(|| missing(format!("{at}.{name}")))
}

fn unsupported(kind: &str, at: &str) -> ApiError {
    refused(
        at,
        format!("blocks of type `{kind}` mean nothing in this place"),
    )
}

fn not_stored(kind: &str, at: &str) -> ApiError {
    refused(
        format!("{at}.type"),
        format!("`{kind}` is no source that can be read here; there is no store of files"),
    )
}

fn define(tools: Vec<InputTool>) -> Result<Vec<Tool>, ApiError> {
    tools
        .into_iter()
        .enumerate()
        .map(|(index, tool)| define_one(tool, &format!("tools.{index}")))
        .collect()
}

fn define_one(tool: InputTool, at: &str) -> Result<Tool, ApiError> {
    if let Some(kind) = tool.kind.as_deref().filter(|kind| *kind != "custom") {
        return Err(refused(
            format!("{at}.type"),
            format!("`{kind}` is its vendor's own; only custom tools work here"),
        ));
    }
    if tool.name.is_empty() {
        return Err(missing(format!("{at}.name")));
    }
    if tool.defer_loading == Some(true) {
        return Err(refused(
            format!("{at}.defer_loading"),
            "there is no search for tools",
        ));
    }
    let others = tool.allowed_callers.unwrap_or_default();
    if others.iter().any(|caller| caller != "direct") {
        return Err(refused(
            format!("{at}.allowed_callers"),
            "only `direct` is possible: no code runs here",
        ));
    }
    let mut description = tool.description;
    for example in tool.input_examples.unwrap_or_default() {
        let text = description.get_or_insert_default();
        if !text.is_empty() {
            text.push('\n');
        }
        *text += &format!("Example of its input: {example}");
    }
    Ok(Tool {
        kind: "function".into(),
        function: FunctionDefinition {
            name: tool.name,
            description,
            parameters: tool.input_schema,
            strict: tool.strict.filter(|strict| *strict),
        },
    })
}

/// `tool_choice`, and whether at most one call is wanted.
fn choose(choice: ToolChoice) -> (Option<Value>, bool) {
    let (choice, one_call) = match choice {
        ToolChoice::Auto {
            disable_parallel_tool_use,
        } => ("auto".into(), disable_parallel_tool_use),
        ToolChoice::Any {
            disable_parallel_tool_use,
        } => ("required".into(), disable_parallel_tool_use),
        ToolChoice::Tool {
            name,
            disable_parallel_tool_use,
        } => (
            json!({"type": "function", "function": {"name": name}}),
            disable_parallel_tool_use,
        ),
        ToolChoice::None => ("none".into(), None),
    };
    (Some(choice), one_call == Some(true))
}

/// Whether to think, and for how many tokens at most.
fn think(thinking: Thinking) -> Result<(bool, Option<u64>), ApiError> {
    let (display, budget) = match thinking {
        Thinking::Disabled => return Ok((false, None)),
        Thinking::BetweenTools => {
            return Err(refused(
                "thinking.type",
                "`between_tools` is not possible: a model thinks before each answer or not at all",
            ));
        }
        Thinking::Enabled {
            budget_tokens,
            display,
        } => (display, Some(budget_tokens)),
        Thinking::Adaptive { display } => (display, None),
    };
    if display.as_deref() == Some("omitted") {
        return Err(refused(
            "thinking.display",
            "thinking is always shown: there is no signature that could stand for it",
        ));
    }
    Ok((true, budget))
}

fn reasoning_effort(effort: String) -> Result<String, ApiError> {
    match effort.as_str() {
        "low" | "medium" | "high" | "xhigh" => Ok(effort),
        "max" => Ok("xhigh".into()), // the most that chat has a word for
        _ => Err(refused(
            "output_config.effort",
            "must be low, medium, high, xhigh or max",
        )),
    }
}

fn response_format(format: OutputFormat, at: &str) -> Result<Value, ApiError> {
    if format.kind != "json_schema" {
        return Err(refused(
            format!("{at}.type"),
            format!("must be `json_schema`, not `{}`", format.kind),
        ));
    }
    let schema = need(format.schema, at, "schema")?;
    Ok(json!({
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": schema, "strict": true},
    }))
}
