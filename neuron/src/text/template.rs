//! The model's chat template: messages in, prompt out. Compiled once.

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind};
use protocol::chat::{Message, Tool};
use serde::Serialize;
use serde_json::ser::Formatter;
use std::fmt::Write as _;
use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

const NAME: &str = "chat_template";

/// A compiled chat template with the variables that belong to the model.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: Option<String>,
    eos_token: Option<String>,
}

/// What a template renders.
#[derive(Debug, Clone, Copy)]
pub struct Conversation<'a> {
    /// The messages so far.
    pub messages: &'a [Message],
    /// The tools the model may call.
    pub tools: &'a [Tool],
    /// Variables the request gives the template, the thinking switch among them.
    pub variables: &'a serde_json::Map<String, serde_json::Value>,
}

/// A conversation that could not be rendered, or a template that could not be compiled.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The template is not valid.
    #[error("the chat template cannot be compiled: {0}")]
    Invalid(String),
    /// The template itself refused the conversation.
    #[error("{0}")]
    Refused(String),
    /// The template failed on the conversation.
    #[error("the chat template failed: {0}")]
    Failed(String),
    /// `arguments` of an earlier call is not an object written as JSON.
    #[error("the arguments of an earlier tool call must be a JSON object in a string: {reason}")]
    Arguments {
        /// Which message.
        message: usize,
        /// Which of its calls.
        call: usize,
        /// What is wrong with it.
        reason: String,
    },
}

impl ChatTemplate {
    /// Compiles `source`. The tokens are those `tokenizer_config.json` names.
    ///
    /// # Errors
    /// [`TemplateError::Invalid`].
    pub fn compile(
        source: String,
        bos_token: Option<String>,
        eos_token: Option<String>,
    ) -> Result<Self, TemplateError> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_formatter(|out, state, value| match as_python_word(value) {
            Some(word) => out.write_str(word).map_err(Error::from),
            None => minijinja::escape_formatter(out, state, value),
        });
        // Prompts are no HTML.
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.add_filter("tojson", to_json);
        environment.add_filter("string", |value: &Value| {
            as_python_word(value).map_or_else(|| value.to_string(), str::to_owned)
        });
        environment.add_function(
            "raise_exception",
            |message: String| -> Result<Value, Error> {
                Err(Error::new(ErrorKind::InvalidOperation, message.clone())
                    .with_source(Raised(message)))
            },
        );
        environment.add_function("strftime_now", |format: &str| {
            let now = SystemTime::now().duration_since(UNIX_EPOCH);
            strftime(format, now.map_or(0, |elapsed| elapsed.as_secs()))
        });
        environment
            .add_template_owned(NAME, source)
            .map_err(|error| TemplateError::Invalid(describe(&error)))?;
        Ok(Self {
            environment,
            bos_token,
            eos_token,
        })
    }

    /// The prompt of `conversation`, ready for the model to answer.
    ///
    /// # Errors
    /// [`TemplateError::Refused`] with the template's own words, or one of the other two.
    pub fn render(&self, conversation: &Conversation<'_>) -> Result<String, TemplateError> {
        let mut context = conversation.variables.clone();
        let mut set = |name: &str, value: serde_json::Value| {
            context.insert(name.to_owned(), value);
        };
        set("messages", messages(conversation.messages)?.into());
        if !conversation.tools.is_empty() {
            set("tools", json(&conversation.tools));
        }
        set("add_generation_prompt", true.into());
        if let Some(token) = &self.bos_token {
            set("bos_token", token.as_str().into());
        }
        if let Some(token) = &self.eos_token {
            set("eos_token", token.as_str().into());
        }
        self.environment
            .get_template(NAME)
            .and_then(|template| template.render(&context))
            .map_err(|error| match raised(&error) {
                Some(message) => TemplateError::Refused(message.to_owned()),
                None => TemplateError::Failed(describe(&error)),
            })
    }
}

/// What `raise_exception` was called with.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

/// The template's own words, when the failure was its wish: errors inside macros arrive wrapped.
fn raised(error: &Error) -> Option<&str> {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(Raised(message)) = error.downcast_ref() {
            return Some(message);
        }
        cause = error.source();
    }
    None
}

fn describe(error: &Error) -> String {
    let detail = error
        .detail()
        .map_or_else(|| error.kind().to_string(), str::to_owned);
    match error.line() {
        Some(line) => format!("line {line}: {detail}"),
        None => detail,
    }
}

fn json(value: &impl Serialize) -> serde_json::Value {
    serde_json::to_value(value).expect("wire types always serialise")
}

/// Messages as templates expect them: arguments of calls as objects, `developer` by its older name.
fn messages(messages: &[Message]) -> Result<Vec<serde_json::Value>, TemplateError> {
    let mut rendered = Vec::with_capacity(messages.len());
    for (index, message) in messages.iter().enumerate() {
        let mut value = json(message);
        if message.role == "developer" {
            value["role"] = "system".into();
        }
        for (call, given) in message.tool_calls.iter().flatten().enumerate() {
            let text = match given.function.arguments.trim() {
                "" => "{}",
                text => text,
            };
            let arguments: serde_json::Map<String, serde_json::Value> = serde_json::from_str(text)
                .map_err(|error| TemplateError::Arguments {
                    message: index,
                    call,
                    reason: error.to_string(),
                })?;
            value["tool_calls"][call]["function"]["arguments"] = arguments.into();
        }
        rendered.push(value);
    }
    Ok(rendered)
}

/// How Python, for which these templates are written, prints the values that have another name there.
fn as_python_word(value: &Value) -> Option<&'static str> {
    match value.kind() {
        ValueKind::Bool if value.is_true() => Some("True"),
        ValueKind::Bool => Some("False"),
        ValueKind::None => Some("None"),
        _ => None,
    }
}

/// `tojson` as transformers defines it: nothing escaped for HTML, letters kept, keys in order.
fn to_json(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    // Accepted because templates name them; they ask for what is done anyway.
    let _: Option<bool> = options.get("ensure_ascii")?;
    let _: Option<Value> = options.get("separators")?;
    options.assert_all_used()?;
    let mut out = Vec::new();
    let written = match indent {
        None => value.serialize(&mut serde_json::Serializer::with_formatter(
            &mut out, Spaced,
        )),
        Some(width) => {
            let indent = " ".repeat(width);
            let pretty = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(
                &mut out, pretty,
            ))
        }
    };
    written.map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    let text = String::from_utf8(out).expect("serde_json writes UTF-8");
    Ok(Value::from_safe_string(text))
}

/// Python's default separators: `", "` and `": "`.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(b": ")
    }
}

/// `format` filled with the UTC time `seconds` after 1970, for the letters that templates use.
fn strftime(format: &str, seconds: u64) -> String {
    const DAYS: [&str; 7] = [
        "Thursday",
        "Friday",
        "Saturday",
        "Sunday",
        "Monday",
        "Tuesday",
        "Wednesday",
    ];
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    let (days, clock) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let weekday = DAYS[usize::try_from(days % 7).expect("below seven")];
    let month_name = MONTHS[month - 1];
    let mut out = String::new();
    let mut letters = format.chars();
    while let Some(letter) = letters.next() {
        if letter != '%' {
            out.push(letter);
            continue;
        }
        let written = match letters.next() {
            Some('Y') => write!(out, "{year}"),
            Some('y') => write!(out, "{:02}", year % 100),
            Some('m') => write!(out, "{month:02}"),
            Some('d') => write!(out, "{day:02}"),
            Some('B') => write!(out, "{month_name}"),
            Some('b') => write!(out, "{}", &month_name[..3]),
            Some('A') => write!(out, "{weekday}"),
            Some('a') => write!(out, "{}", &weekday[..3]),
            Some('H') => write!(out, "{:02}", clock / 3600),
            Some('M') => write!(out, "{:02}", clock / 60 % 60),
            Some('S') => write!(out, "{:02}", clock % 60),
            Some('%') => write!(out, "%"),
            Some(other) => write!(out, "%{other}"),
            None => write!(out, "%"),
        };
        written.expect("writing to a string does not fail");
    }
    out
}

/// Year, month and day of the month, `days` after 1 January 1970.
fn civil(days: u64) -> (u64, usize, u64) {
    let leap = |year: u64| {
        year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
    };
    let (mut year, mut left) = (1970, days);
    while left >= 365 + u64::from(leap(year)) {
        left -= 365 + u64::from(leap(year));
        year += 1;
    }
    let february = 28 + u64::from(leap(year));
    let lengths = [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while left >= lengths[month] {
        left -= lengths[month];
        month += 1;
    }
    (year, month + 1, left + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::tokenizer::tests::fixture;
    use serde_json::json;

    fn template() -> ChatTemplate {
        let source = std::fs::read_to_string(fixture().join("chat_template.jinja")).unwrap();
        ChatTemplate::compile(source, None, Some("<|im_end|>".into())).unwrap()
    }

    fn try_render(
        template: &ChatTemplate,
        request: serde_json::Value,
    ) -> Result<String, TemplateError> {
        let messages: Vec<Message> = serde_json::from_value(request["messages"].clone()).unwrap();
        let tools: Vec<Tool> = request
            .get("tools")
            .map(|tools| serde_json::from_value(tools.clone()).unwrap())
            .unwrap_or_default();
        let variables = request["variables"]
            .as_object()
            .cloned()
            .unwrap_or_default();
        template.render(&Conversation {
            messages: &messages,
            tools: &tools,
            variables: &variables,
        })
    }

    fn render(request: serde_json::Value) -> String {
        try_render(&template(), request).unwrap()
    }

    fn inline(source: &str) -> String {
        let template = ChatTemplate::compile(source.into(), Some("<s>".into()), None).unwrap();
        try_render(
            &template,
            json!({"messages": [], "variables": {"x": {"b": [1, "é<'>"], "a": null, "t": true}}}),
        )
        .unwrap()
    }

    #[test]
    fn a_plain_conversation_is_chatml_with_thinking_off() {
        assert_eq!(
            render(json!({"messages": [
                {"role": "developer", "content": " Be brief. "},
                {"role": "user", "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]},
                {"role": "assistant", "content": "<think>\nold\n</think>\n\nHello."},
                {"role": "user", "content": "Bye"},
            ]})),
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n\
             <|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n\
             <|im_start|>assistant\n<think>\n\n</think>\n\n"
        );
    }

    #[test]
    fn thinking_is_opened_when_asked_for() {
        let prompt = render(json!({
            "messages": [{"role": "user", "content": "Hi"}],
            "variables": {"enable_thinking": true},
        }));
        assert!(
            prompt.ends_with("<|im_start|>assistant\n<think>\n"),
            "{prompt}"
        );
    }

    #[test]
    fn calls_and_results_are_written_in_the_models_form() {
        let prompt = render(json!({
            "messages": [
                {"role": "user", "content": "Find"},
                {"role": "assistant", "content": null, "reasoning_content": "look", "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "find",
                     "arguments": "{\"text\": \"é\", \"deep\": true, \"where\": {\"b\": 1, \"a\": [2]}}"}},
                    {"id": "2", "type": "function", "function": {"name": "now", "arguments": ""}},
                ]},
                {"role": "tool", "tool_call_id": "1", "content": "one"},
                {"role": "tool", "tool_call_id": "2", "content": "two"},
            ],
            "tools": [{"type": "function", "function": {"name": "find", "description": "<é>"}}],
        }));
        assert!(
            prompt.starts_with("<|im_start|>system\n# Tools\n"),
            "{prompt}"
        );
        assert!(
            prompt.contains("\n{\"type\": \"function\", \"function\": {\"name\": \"find\", \"description\": \"<é>\"}}\n</tools>"),
            "{prompt}"
        );
        assert!(
            prompt.contains(
                "<|im_start|>assistant\n<think>\nlook\n</think>\n\n<tool_call>\n<function=find>\n\
                 <parameter=text>\né\n</parameter>\n<parameter=deep>\nTrue\n</parameter>\n\
                 <parameter=where>\n{\"b\": 1, \"a\": [2]}\n</parameter>\n</function>\n</tool_call>\n\
                 <tool_call>\n<function=now>\n</function>\n</tool_call><|im_end|>\n\
                 <|im_start|>user\n<tool_response>\none\n</tool_response>\n\
                 <tool_response>\ntwo\n</tool_response><|im_end|>\n"
            ),
            "{prompt}"
        );
    }

    #[test]
    fn a_refusal_has_the_templates_own_words() {
        let late = json!({"messages": [
            {"role": "user", "content": "Hi"}, {"role": "system", "content": "late"}]});
        let error = try_render(&template(), late).unwrap_err();
        assert!(
            matches!(&error, TemplateError::Refused(words) if words == "a system message must come first"),
            "{error:?}"
        );
        let broken = ChatTemplate::compile("{{ 1 + [] }}".into(), None, None).unwrap();
        let error = try_render(&broken, json!({"messages": []})).unwrap_err();
        assert!(matches!(error, TemplateError::Failed(_)), "{error:?}");
        let invalid = ChatTemplate::compile("{% if %}".into(), None, None).unwrap_err();
        assert!(matches!(invalid, TemplateError::Invalid(_)), "{invalid:?}");
    }

    #[test]
    fn arguments_that_are_no_object_are_named() {
        let request = json!({"messages": [{"role": "assistant", "tool_calls": [
            {"id": "1", "function": {"name": "f", "arguments": "[1]"}}]}]});
        let error = try_render(&template(), request).unwrap_err();
        assert!(
            matches!(
                error,
                TemplateError::Arguments {
                    message: 0,
                    call: 0,
                    ..
                }
            ),
            "{error:?}"
        );
    }

    #[test]
    fn json_is_written_as_transformers_writes_it() {
        assert_eq!(
            inline("{{ x | tojson }}"),
            "{\"b\": [1, \"é<'>\"], \"a\": null, \"t\": true}"
        );
        assert_eq!(
            inline("{{ [1, {}] | tojson(indent=2) }}"),
            "[\n  1,\n  {}\n]"
        );
        assert_eq!(
            inline("{{ x.t }} {{ x.t | string }} {{ x.a }}{{ nothing }}"),
            "True True None"
        );
        assert_eq!(inline("{{ bos_token }}{{ '<b>' }}"), "<s><b>");
        assert_eq!(inline("{{ ' a\n'.rstrip('\\n').split(' ')[-1] }}"), "a");
    }

    #[test]
    fn dates_are_right_around_leap_days() {
        assert_eq!(
            strftime("%Y-%m-%d %H:%M:%S %a %b", 951_782_400),
            "2000-02-29 00:00:00 Tue Feb"
        );
        assert_eq!(
            strftime("%d %B %Y %A %%", 1_735_689_599),
            "31 December 2024 Tuesday %"
        );
        assert_eq!(strftime("%y%j", 0), "70%j");
    }
}
