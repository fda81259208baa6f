//! Responses request → chat request, and the empty response that will hold the answer.

use super::fields;
use super::wire::{
    Contents, FunctionTool, Input, InputItem, InputPart, Reasoning, ReasoningEcho, Response,
    ResponsesRequest, Status, Text, TextEcho,
};
use protocol::ApiError;
use protocol::chat::{
    ChatRequest, Content, FunctionCall, FunctionDefinition, ImageUrl, Message, Part, StreamOptions,
    Tool, ToolCall,
};
use serde_json::{Map, Value, json};

/// Tools that run on their vendor's servers or on a client's machine by a protocol of their own.
const FOREIGN_TOOLS: &str = "only tools of type `function` work here";

/// The chat request that asks for the same, and the response as it is before anything is answered.
pub(super) fn to_chat(
    request: ResponsesRequest,
    id: String,
) -> Result<(ChatRequest, Response), ApiError> {
    let mut extra = fields::pass_on(request.extra)?;
    fields::check_include(request.include.iter().flatten().map(String::as_str))?;
    let reasoning = check_reasoning(request.reasoning)?;
    let metadata = request.metadata.unwrap_or_default();
    check_metadata(&metadata)?;
    let tools = request.tools.unwrap_or_default();
    check_tools(&tools)?;
    let tool_choice = request.tool_choice.filter(|choice| !choice.is_null());
    let (offered, choice) = choose(tool_choice.as_ref(), &tools)?;
    let format = text_format(request.text)?;
    if let Some(format) = &format {
        extra.insert("response_format".into(), response_format(format)?);
    }
    for (name, value) in [
        ("safety_identifier", &request.safety_identifier),
        ("prompt_cache_key", &request.prompt_cache_key),
    ] {
        if let Some(value) = value {
            extra.insert(name.into(), value.as_str().into());
        }
    }
    let stream = request.stream.unwrap_or(false);
    // who names a number of alternatives wants to see them, whether or not they are to be included
    let top_logprobs = request.top_logprobs.filter(|count| *count > 0);
    let asked = |what: &String| what == fields::LOGPROBS;
    let logprobs = top_logprobs.is_some() || request.include.iter().flatten().any(asked);
    let chat = ChatRequest {
        model: request.model.clone(),
        messages: conversation(request.instructions.as_deref(), request.input)?,
        stream: stream.then_some(true),
        stream_options: stream.then_some(StreamOptions {
            include_usage: true,
        }),
        max_tokens: request.max_output_tokens,
        temperature: request.temperature,
        top_p: request.top_p,
        tools: (!offered.is_empty()).then(|| offered.into_iter().map(define).collect()),
        tool_choice: choice,
        parallel_tool_calls: request.parallel_tool_calls,
        reasoning_effort: reasoning.effort.clone(),
        logprobs: logprobs.then_some(true),
        top_logprobs,
        user: request.user.clone(),
        extra,
        ..ChatRequest::default()
    };
    let response = Response {
        id,
        object: "response",
        created_at: 0,
        status: Status::InProgress,
        background: false,
        error: None,
        incomplete_details: None,
        instructions: request.instructions,
        max_output_tokens: request.max_output_tokens,
        max_tool_calls: request.max_tool_calls,
        model: request.model,
        output: Vec::new(),
        parallel_tool_calls: request.parallel_tool_calls.unwrap_or(true),
        previous_response_id: request.previous_response_id,
        prompt_cache_key: request.prompt_cache_key,
        reasoning,
        safety_identifier: request.safety_identifier,
        service_tier: "default",
        temperature: request.temperature,
        text: TextEcho {
            format: format.unwrap_or_else(|| json!({"type": "text"})),
        },
        tool_choice: tool_choice.unwrap_or_else(|| "auto".into()),
        tools,
        top_logprobs: top_logprobs.unwrap_or(0),
        top_p: request.top_p,
        truncation: "disabled",
        usage: None,
        user: request.user,
        metadata,
    };
    Ok((chat, response))
}

fn check_reasoning(reasoning: Option<Reasoning>) -> Result<ReasoningEcho, ApiError> {
    let Some(reasoning) = reasoning else {
        return Ok(ReasoningEcho::default());
    };
    if reasoning
        .mode
        .as_deref()
        .is_some_and(|mode| mode != "standard")
    {
        return Err(ApiError::invalid(
            "reasoning.mode",
            "`reasoning.mode` is not supported: there is one way of thinking",
        ));
    }
    let summary = reasoning.summary.or(reasoning.generate_summary);
    match summary.as_deref() {
        None | Some("auto" | "detailed") => Ok(ReasoningEcho {
            effort: reasoning.effort,
            summary,
        }),
        Some("concise") => Err(ApiError::invalid(
            "reasoning.summary",
            "nobody here can shorten thinking: `auto` and `detailed` give it as it is",
        )),
        Some(_) => Err(ApiError::invalid(
            "reasoning.summary",
            "`reasoning.summary` must be `auto` or `detailed`",
        )),
    }
}

fn check_metadata(metadata: &Map<String, Value>) -> Result<(), ApiError> {
    let sane = metadata.len() <= 16
        && metadata.iter().all(|(key, value)| {
            key.chars().count() <= 64
                && value
                    .as_str()
                    .is_some_and(|text| text.chars().count() <= 512)
        });
    if sane {
        return Ok(());
    }
    Err(ApiError::invalid(
        "metadata",
        "`metadata` is at most 16 strings of 512 characters, by names of 64",
    ))
}

fn check_tools(tools: &[FunctionTool]) -> Result<(), ApiError> {
    for (index, tool) in tools.iter().enumerate() {
        if tool.kind != "function" {
            return Err(ApiError::invalid(
                format!("tools[{index}].type"),
                format!("tools[{index}]: `{}`: {FOREIGN_TOOLS}", tool.kind),
            ));
        }
        if tool.name.is_empty() {
            return Err(ApiError::invalid(
                format!("tools[{index}].name"),
                format!("tools[{index}] has no name"),
            ));
        }
    }
    Ok(())
}

fn define(tool: &FunctionTool) -> Tool {
    Tool {
        kind: "function".into(),
        function: FunctionDefinition {
            name: tool.name.clone(),
            description: tool.description.clone(),
            parameters: tool.parameters.clone(),
            strict: tool.strict,
        },
    }
}

/// The tools to offer, and the chat's `tool_choice`.
fn choose<'a>(
    choice: Option<&Value>,
    tools: &'a [FunctionTool],
) -> Result<(Vec<&'a FunctionTool>, Option<Value>), ApiError> {
    let all = || tools.iter().collect();
    let Some(choice) = choice else {
        return Ok((all(), None));
    };
    let kind = choice["type"].as_str().or(choice.as_str());
    match kind {
        Some("auto" | "none" | "required") if choice.is_string() => {
            Ok((all(), Some(choice.clone())))
        }
        Some("function") => {
            let name = named(choice, tools, "tool_choice")?;
            let choice = json!({"type": "function", "function": {"name": name}});
            Ok((all(), Some(choice)))
        }
        // the others are not offered at all, which no model can get wrong
        Some("allowed_tools") => {
            let mode = match choice["mode"].as_str() {
                Some(mode @ ("auto" | "required")) => mode,
                _ => {
                    return Err(ApiError::invalid(
                        "tool_choice.mode",
                        "`tool_choice.mode` must be `auto` or `required`",
                    ));
                }
            };
            let mut allowed = Vec::new();
            for tool in choice["tools"].as_array().into_iter().flatten() {
                allowed.push(named(tool, tools, "tool_choice.tools")?);
            }
            let offered = tools
                .iter()
                .filter(|tool| allowed.contains(&&*tool.name))
                .collect();
            Ok((offered, Some(mode.into())))
        }
        _ => Err(ApiError::invalid(
            "tool_choice",
            format!("`tool_choice` of this kind is not supported: {FOREIGN_TOOLS}"),
        )),
    }
}

/// The name of the tool that `choice` means.
fn named<'a>(choice: &Value, tools: &'a [FunctionTool], param: &str) -> Result<&'a str, ApiError> {
    let name = choice["name"].as_str().unwrap_or_default();
    tools
        .iter()
        .find(|tool| choice["type"] == "function" && tool.name == name)
        .map(|tool| &*tool.name)
        .ok_or_else(|| {
            let message = format!("`{param}` names `{name}`, which is none of `tools`");
            ApiError::invalid(param, message)
        })
}

fn text_format(text: Option<Text>) -> Result<Option<Value>, ApiError> {
    let Some(text) = text else {
        return Ok(None);
    };
    if text
        .verbosity
        .as_deref()
        .is_some_and(|wanted| wanted != "medium")
    {
        return Err(ApiError::invalid(
            "text.verbosity",
            "`text.verbosity` is not supported: say in `instructions` how long answers are to be",
        ));
    }
    Ok(text
        .format
        .filter(|format| !format.is_null() && format["type"] != "text"))
}

/// A format that this API has flat and chat has nested.
fn response_format(format: &Value) -> Result<Value, ApiError> {
    match format["type"].as_str() {
        Some("json_object") => Ok(json!({"type": "json_object"})),
        Some("json_schema") => {
            let mut schema = Map::new();
            for field in ["name", "description", "schema", "strict"] {
                if let Some(value) = format.get(field).filter(|value| !value.is_null()) {
                    schema.insert(field.into(), value.clone());
                }
            }
            for field in ["name", "schema"] {
                if !schema.contains_key(field) {
                    let param = format!("text.format.{field}");
                    let message = format!("`{param}` is missing");
                    return Err(ApiError::invalid(param, message));
                }
            }
            Ok(json!({"type": "json_schema", "json_schema": schema}))
        }
        _ => Err(ApiError::invalid(
            "text.format.type",
            "`text.format.type` must be `text`, `json_object` or `json_schema`",
        )),
    }
}

/// The messages that `instructions` and `input` make.
fn conversation(
    instructions: Option<&str>,
    input: Option<Input>,
) -> Result<Vec<Message>, ApiError> {
    let mut talk = Conversation::default();
    if let Some(text) = instructions.filter(|text| !text.is_empty()) {
        talk.push("system", Content::Text(text.into()));
    }
    match input {
        None => return Err(ApiError::invalid("input", "`input` is missing")),
        Some(Input::Text(text)) => talk.push("user", Content::Text(text)),
        Some(Input::Items(items)) => {
            for (index, item) in items.into_iter().enumerate() {
                talk.item(item, &format!("input[{index}]"))?;
            }
        }
    }
    talk.flush();
    Ok(talk.messages)
}

/// Messages so far. Thinking, text and calls that follow each other are one turn of the assistant.
#[derive(Default)]
struct Conversation {
    messages: Vec<Message>,
    /// The assistant's turn that is still growing.
    turn: Option<Message>,
}

impl Conversation {
    fn item(&mut self, item: InputItem, at: &str) -> Result<(), ApiError> {
        match item.kind.as_deref() {
            Some("message") => self.message(item, at),
            None if item.role.is_some() => self.message(item, at),
            Some("function_call") => self.call(item, at),
            Some("function_call_output") => self.output(item, at),
            Some("reasoning") => {
                self.reasoning(item);
                Ok(())
            }
            Some("item_reference") => Err(ApiError::invalid(
                at,
                format!("{at} refers to an item of a response that is not kept here"),
            )),
            kind => Err(ApiError::invalid(
                format!("{at}.type"),
                format!(
                    "{at}: items of type `{}` have no meaning here",
                    kind.unwrap_or_default()
                ),
            )),
        }
    }

    fn message(&mut self, item: InputItem, at: &str) -> Result<(), ApiError> {
        let role = item.role.unwrap_or_default();
        if !["user", "assistant", "system", "developer"].contains(&&*role) {
            return Err(ApiError::invalid(
                format!("{at}.role"),
                format!(
                    "{at}.role must be `user`, `assistant`, `system` or `developer`, not `{role}`"
                ),
            ));
        }
        let at = format!("{at}.content");
        let content = match item.content {
            Some(Contents::Text(text)) => Content::Text(text),
            Some(Contents::Parts(parts)) => content(parts, role == "user", &at)?,
            Some(Contents::Other(_)) | None => {
                let message = format!("{at} must be a string or a list of parts");
                return Err(ApiError::invalid(at, message));
            }
        };
        if role == "assistant" {
            let turn = self.turn(|turn| turn.content.is_none());
            turn.content = Some(content);
        } else {
            self.flush();
            self.push(&role, content);
        }
        Ok(())
    }

    fn reasoning(&mut self, item: InputItem) {
        let content = match item.content {
            Some(Contents::Parts(parts)) => parts,
            _ => Vec::new(),
        };
        let mut text: String = texts(content);
        if text.is_empty() {
            text = texts(item.summary.unwrap_or_default());
        }
        if text.is_empty() {
            return; // encrypted for a vendor's own models: nothing here can read it
        }
        let turn = self.turn(|turn| turn.content.is_none() && turn.tool_calls.is_none());
        turn.reasoning_content
            .get_or_insert_default()
            .push_str(&text);
    }

    fn call(&mut self, item: InputItem, at: &str) -> Result<(), ApiError> {
        let arguments = match item.arguments {
            Some(Value::String(text)) => text,
            Some(Value::Null) | None => String::new(),
            Some(value) => value.to_string(),
        };
        let call = ToolCall {
            id: required(item.call_id, at, "call_id")?,
            kind: "function".into(),
            function: FunctionCall {
                name: required(item.name, at, "name")?,
                arguments,
            },
        };
        let turn = self.turn(|_| true);
        turn.tool_calls.get_or_insert_default().push(call);
        Ok(())
    }

    fn output(&mut self, item: InputItem, at: &str) -> Result<(), ApiError> {
        let id = required(item.call_id, at, "call_id")?;
        let at = format!("{at}.output");
        let (mut text, mut images) = (String::new(), Vec::new());
        match item.output {
            Some(Contents::Text(all)) => text = all,
            Some(Contents::Parts(parts)) => {
                for (index, part) in parts.into_iter().enumerate() {
                    match self::part(part, true, &format!("{at}[{index}]"))? {
                        Part::Text { text: more } => text += &more,
                        image @ Part::ImageUrl { .. } => images.push(image),
                    }
                }
            }
            Some(Contents::Other(_)) | None => {
                let message = format!("{at} must be a string or a list of parts");
                return Err(ApiError::invalid(at, message));
            }
        }
        self.flush();
        self.messages.push(Message {
            role: "tool".into(),
            content: Some(Content::Text(text)),
            tool_call_id: Some(id),
            ..Message::default()
        });
        if !images.is_empty() {
            self.push("user", Content::Parts(images)); // a tool message has only text
        }
        Ok(())
    }

    fn push(&mut self, role: &str, content: Content) {
        self.messages.push(Message {
            role: role.into(),
            content: Some(content),
            ..Message::default()
        });
    }

    /// The assistant's growing turn, or a new one where the old has no place for what comes.
    fn turn(&mut self, has_place: impl FnOnce(&Message) -> bool) -> &mut Message {
        if self.turn.as_ref().is_some_and(|turn| !has_place(turn)) {
            self.flush();
        }
        self.turn.get_or_insert_with(|| Message {
            role: "assistant".into(),
            ..Message::default()
        })
    }

    fn flush(&mut self) {
        self.messages.extend(self.turn.take());
    }
}

fn required(value: Option<String>, at: &str, name: &str) -> Result<String, ApiError> {
    value.filter(|value| !value.is_empty()).ok_or_else(|| {
        let param = format!("{at}.{name}");
        let message = format!("`{param}` is missing");
        ApiError::invalid(param, message)
    })
}

fn texts(parts: Vec<InputPart>) -> String {
    parts.into_iter().filter_map(|part| part.text).collect()
}

/// Parts of a message. Only text stays text; a list is kept where it holds images.
fn content(parts: Vec<InputPart>, images: bool, at: &str) -> Result<Content, ApiError> {
    let parts = parts
        .into_iter()
        .enumerate()
        .map(|(index, part)| self::part(part, images, &format!("{at}[{index}]")))
        .collect::<Result<Vec<_>, _>>()?;
    if images {
        return Ok(Content::Parts(parts));
    }
    Ok(Content::Text(Content::Parts(parts).text().into_owned()))
}

fn part(part: InputPart, images: bool, at: &str) -> Result<Part, ApiError> {
    match part.kind.as_str() {
        "input_text" | "output_text" | "text" => Ok(Part::Text {
            text: required_text(part.text, at, "text")?,
        }),
        "refusal" => Ok(Part::Text {
            text: required_text(part.refusal, at, "refusal")?,
        }),
        "input_image" if images => {
            let url = part.image_url.ok_or_else(|| {
                ApiError::invalid(
                    format!("{at}.image_url"),
                    format!("{at}.image_url is missing: no files are kept here, an image comes as a URL or data URL"),
                )
            })?;
            Ok(Part::ImageUrl {
                image_url: ImageUrl {
                    url,
                    detail: part.detail,
                },
            })
        }
        kind => Err(ApiError::invalid(
            format!("{at}.type"),
            format!("{at}: `{kind}` is not supported here"),
        )),
    }
}

/// Text may be empty, but not absent.
fn required_text(value: Option<String>, at: &str, name: &str) -> Result<String, ApiError> {
    value.ok_or_else(|| {
        let param = format!("{at}.{name}");
        let message = format!("`{param}` is missing");
        ApiError::invalid(param, message)
    })
}
