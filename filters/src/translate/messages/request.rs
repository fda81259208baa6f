//! Messages request → chat request.

use super::wire::{
    Blocks, ImageSource, InputBlock, InputMessage, InputTool, MessagesRequest, Thinking, ToolChoice,
};
use protocol::ApiError;
use protocol::chat::{
    ChatRequest, Content, FunctionCall, FunctionDefinition, ImageUrl, Message, Part, StopStrings,
    StreamOptions, Tool, ToolCall,
};
use serde_json::{Map, Value, json};

/// The chat request that asks for the same.
pub(super) fn to_chat(request: MessagesRequest) -> Result<ChatRequest, ApiError> {
    let mut messages = Vec::with_capacity(request.messages.len() + 1);
    if let Some(system) = request.system {
        let text = text_of(system, "system")?;
        messages.push(message("system", Some(Content::Text(text))));
    }
    for (index, turn) in request.messages.into_iter().enumerate() {
        add_turn(&mut messages, turn, &format!("messages.{index}"))?;
    }
    let stream = request.stream.unwrap_or(false);
    let (tool_choice, one_call) = match request.tool_choice {
        None => (None, false),
        Some(choice) => choose(choice),
    };
    let mut extra = Map::new();
    let thinking = request.thinking.map(|thinking| match thinking {
        Thinking::Enabled { budget_tokens } => {
            extra.insert("thinking_budget".into(), budget_tokens.into());
            true
        }
        Thinking::Adaptive => true,
        Thinking::Disabled => false,
    });
    Ok(ChatRequest {
        model: request.model,
        messages,
        stream: stream.then_some(true),
        stream_options: stream.then_some(StreamOptions {
            include_usage: true,
        }),
        max_tokens: Some(request.max_tokens),
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
        chat_template_kwargs: thinking
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
fn add_turn(messages: &mut Vec<Message>, turn: InputMessage, at: &str) -> Result<(), ApiError> {
    let blocks = match (turn.role.as_str(), turn.content) {
        ("user" | "assistant" | "system", Blocks::Text(text)) => {
            messages.push(message(&turn.role, Some(Content::Text(text))));
            return Ok(());
        }
        ("user" | "assistant", Blocks::List(blocks)) => blocks,
        ("system", blocks) => {
            messages.push(message("system", Some(Content::Text(text_of(blocks, at)?))));
            return Ok(());
        }
        (role, _) => {
            return Err(ApiError::invalid(
                format!("{at}.role"),
                format!("{at}.role must be `user` or `assistant`, not `{role}`"),
            ));
        }
    };
    if turn.role == "assistant" {
        messages.push(assistant(blocks, at)?);
        return Ok(());
    }
    let mut parts = Vec::new();
    for (index, block) in blocks.into_iter().enumerate() {
        let at = format!("{at}.content.{index}");
        match block {
            InputBlock::Text { text } => parts.push(Part::Text { text }),
            InputBlock::Image { source } => parts.push(image(source)),
            InputBlock::ToolResult {
                tool_use_id,
                content,
                is_error,
            } => {
                flush(messages, &mut parts);
                let (text, images) = tool_result(content, is_error.unwrap_or(false), &at)?;
                messages.push(Message {
                    tool_call_id: Some(tool_use_id),
                    ..message("tool", Some(Content::Text(text)))
                });
                parts.extend(images); // a tool message has only text; its images follow as the user's
            }
            _ => return Err(unsupported(&at)),
        }
    }
    flush(messages, &mut parts);
    Ok(())
}

fn flush(messages: &mut Vec<Message>, parts: &mut Vec<Part>) {
    match std::mem::take(parts) {
        parts if parts.is_empty() => {}
        parts => messages.push(message("user", Some(Content::Parts(parts)))),
    }
}

fn assistant(blocks: Vec<InputBlock>, at: &str) -> Result<Message, ApiError> {
    let (mut text, mut thinking, mut calls) = (String::new(), String::new(), Vec::new());
    for (index, block) in blocks.into_iter().enumerate() {
        match block {
            InputBlock::Text { text: more } => text += &more,
            InputBlock::Thinking { thinking: more } => thinking += &more,
            InputBlock::RedactedThinking {} => {}
            InputBlock::ToolUse { id, name, input } => calls.push(ToolCall {
                id,
                kind: "function".into(),
                function: FunctionCall {
                    name,
                    arguments: input.to_string(),
                },
            }),
            _ => return Err(unsupported(&format!("{at}.content.{index}"))),
        }
    }
    Ok(Message {
        reasoning_content: (!thinking.is_empty()).then_some(thinking),
        tool_calls: (!calls.is_empty()).then_some(calls),
        ..message(
            "assistant",
            (!text.is_empty()).then_some(Content::Text(text)),
        )
    })
}

/// A result's text, and the images that came with it.
fn tool_result(
    content: Option<Blocks>,
    is_error: bool,
    at: &str,
) -> Result<(String, Vec<Part>), ApiError> {
    let (mut text, mut images) = (String::new(), Vec::new());
    match content {
        None => {}
        Some(Blocks::Text(all)) => text = all,
        Some(Blocks::List(blocks)) => {
            for (index, block) in blocks.into_iter().enumerate() {
                match block {
                    InputBlock::Text { text: more } => text += &more,
                    InputBlock::Image { source } => images.push(image(source)),
                    _ => return Err(unsupported(&format!("{at}.content.{index}"))),
                }
            }
        }
    }
    if is_error {
        text = format!("Error: {text}"); // chat has no flag for it, and the model must know
    }
    Ok((text, images))
}

fn image(source: ImageSource) -> Part {
    let url = match source {
        ImageSource::Base64 { media_type, data } => format!("data:{media_type};base64,{data}"),
        ImageSource::Url { url } => url,
    };
    Part::ImageUrl {
        image_url: ImageUrl { url, detail: None },
    }
}

fn text_of(blocks: Blocks, at: &str) -> Result<String, ApiError> {
    match blocks {
        Blocks::Text(text) => Ok(text),
        Blocks::List(blocks) => blocks
            .into_iter()
            .enumerate()
            .map(|(index, block)| match block {
                InputBlock::Text { text } => Ok(text),
                _ => Err(ApiError::invalid(
                    format!("{at}.{index}"),
                    format!("{at}.{index} must be a text block"),
                )),
            })
            .collect::<Result<Vec<_>, _>>()
            .map(|texts| texts.join("\n")),
    }
}

fn unsupported(at: &str) -> ApiError {
    ApiError::invalid(
        at,
        format!("{at} is of a kind that is not supported here in this turn"),
    )
}

fn define(tools: Vec<InputTool>) -> Result<Vec<Tool>, ApiError> {
    tools
        .into_iter()
        .enumerate()
        .map(|(index, tool)| match tool.kind.as_deref() {
            None | Some("custom") => Ok(Tool {
                kind: "function".into(),
                function: FunctionDefinition {
                    name: tool.name,
                    description: tool.description,
                    parameters: tool.input_schema,
                    strict: None,
                },
            }),
            Some(kind) => Err(ApiError::invalid(
                format!("tools.{index}.type"),
                format!("tools.{index}: `{kind}` runs on its vendor's servers; only custom tools work here"),
            )),
        })
        .collect()
}

/// `tool_choice`, and whether at most one call is wanted.
fn choose(choice: ToolChoice) -> (Option<Value>, bool) {
    match choice {
        ToolChoice::Auto {
            disable_parallel_tool_use,
        } => (Some("auto".into()), disable_parallel_tool_use),
        ToolChoice::Any {
            disable_parallel_tool_use,
        } => (Some("required".into()), disable_parallel_tool_use),
        ToolChoice::Tool {
            name,
            disable_parallel_tool_use,
        } => (
            Some(json!({"type": "function", "function": {"name": name}})),
            disable_parallel_tool_use,
        ),
        ToolChoice::None => (Some("none".into()), false),
    }
}
