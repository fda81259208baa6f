//! `POST /v1/chat/completions`.

use super::body::{self, Field, is};
use super::failure::{Failure, template};
use super::fields::{self, Sampling};
use super::generation::{self, Answer, Delivery, Origin, Whole, find_model, in_background, new_id};
use super::{ApiState, RequestId};
use crate::engine::request::{Finish, Request};
use crate::residency::{ServedModel, unix_seconds};
use crate::text::output::{Delta, Output, OutputOptions};
use crate::text::reasoning::ThinkTags;
use crate::text::template::Conversation;
use axum::body::Body;
use axum::extract::{Extension, State};
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use protocol::ApiError;
use protocol::chat::{
    AssistantMessage, ChatChunk, ChatReply, ChatRequest, Choice, ChunkChoice, Content,
    Delta as WireDelta, FunctionCallDelta, Message, Part, StopStrings, StreamOptions, Tool,
    ToolCallDelta,
};
use protocol::sse::write_data;
use serde_json::{Map, Value};
use std::sync::Arc;
use std::time::Instant;

const FIELDS: &[Field] = &[
    ("model", is::<String>, "a string"),
    ("messages", is::<Vec<Message>>, "a list of messages"),
    ("stream", is::<Option<bool>>, "true or false"),
    ("stream_options", is::<Option<StreamOptions>>, "an object"),
    ("max_tokens", is::<Option<u64>>, "a whole number, 1 or more"),
    (
        "max_completion_tokens",
        is::<Option<u64>>,
        "a whole number, 1 or more",
    ),
    ("temperature", is::<Option<f64>>, "a number"),
    ("top_p", is::<Option<f64>>, "a number"),
    ("top_k", is::<Option<i64>>, "a whole number"),
    ("min_p", is::<Option<f64>>, "a number"),
    ("seed", is::<Option<i64>>, "a whole number"),
    (
        "stop",
        is::<Option<StopStrings>>,
        "a string or a list of strings",
    ),
    (
        "tools",
        is::<Option<Vec<Tool>>>,
        "a list of tools of type `function`",
    ),
    ("parallel_tool_calls", is::<Option<bool>>, "true or false"),
    ("reasoning_effort", is::<Option<String>>, "a string"),
    (
        "chat_template_kwargs",
        is::<Option<Map<String, Value>>>,
        "an object",
    ),
    ("user", is::<Option<String>>, "a string"),
];

/// Checks, renders, tokenises, generates.
pub(super) async fn complete(
    State(state): State<Arc<ApiState>>,
    Extension(request_id): Extension<RequestId>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Failure> {
    let arrived = Instant::now();
    let bytes = body::read(&headers, body, state.limits.max_body_bytes).await?;
    let wire: ChatRequest = body::parse(&bytes, FIELDS)?;
    let unknown_fields = fields::check(&wire.extra, &state.metrics)?;
    let delivery = Delivery::new(wire.stream, wire.stream_options, &headers, unknown_fields)?;
    let model = find_model(&state, &wire.model)?;
    let answer = ChatAnswer::new(&wire.model);
    let origin = Origin {
        id: request_id.0.clone(),
        arrived,
        deadline: arrived + state.limits.request_deadline,
    };
    let served = model.clone();
    let request = in_background(move || prepare(wire, &served, origin)).await?;
    generation::answer(&model, request, answer, delivery, &request_id).await
}

/// Everything that can be wrong with a request is found here.
fn prepare(wire: ChatRequest, model: &ServedModel, origin: Origin) -> Result<Request, ApiError> {
    let sampling = Sampling {
        temperature: wire.temperature,
        top_p: wire.top_p,
        top_k: wire.top_k,
        min_p: wire.min_p,
        seed: wire.seed,
    };
    let sampling = sampling.checked(model.text.sampling)?;
    let stop = fields::stop_strings(wire.stop)?;
    check_messages(&wire.messages)?;
    let tools = offered_tools(wire.tools, wire.tool_choice.as_ref())?;
    let variables =
        template_variables(wire.chat_template_kwargs, wire.reasoning_effort.as_deref())?;
    let prompt = model
        .text
        .template
        .render(&Conversation {
            messages: &wire.messages,
            tools: &tools,
            variables: &variables,
        })
        .map_err(template)?;
    let ids = model
        .text
        .tokenizer
        .encode(&prompt)
        .map_err(|error| ApiError::invalid("messages", error.to_string()))?;
    if ids.is_empty() {
        return Err(ApiError::invalid("messages", "the prompt is empty"));
    }
    let wanted = match wire.max_completion_tokens {
        Some(wanted) => ("max_completion_tokens", Some(wanted)),
        None => ("max_tokens", wire.max_tokens),
    };
    let max_tokens = fields::max_tokens(wanted, ids.len(), model.context_length)?;
    let options = OutputOptions {
        stop,
        thinking: Some(ThinkTags::opened_by(&prompt)),
        one_call: wire.parallel_tool_calls == Some(false),
        tools: (!tools.is_empty()).then(|| tools.into()),
    };
    Ok(Request {
        id: origin.id,
        arrived: origin.arrived,
        deadline: origin.deadline,
        prompt: ids,
        max_tokens,
        sampling,
        output: Output::new(model.text.tokenizer.clone(), options),
    })
}

fn check_messages(messages: &[Message]) -> Result<(), ApiError> {
    if messages.is_empty() {
        return Err(ApiError::invalid("messages", "`messages` is empty"));
    }
    for (index, message) in messages.iter().enumerate() {
        let Some(Content::Parts(parts)) = &message.content else {
            continue;
        };
        if parts.iter().any(|part| !matches!(part, Part::Text { .. })) {
            let param = format!("messages[{index}].content");
            return Err(ApiError::invalid(param, "this model reads text only"));
        }
    }
    Ok(())
}

/// The tools the model is told about.
fn offered_tools(tools: Option<Vec<Tool>>, choice: Option<&Value>) -> Result<Vec<Tool>, ApiError> {
    let tools = tools.unwrap_or_default();
    if let Some(index) = tools.iter().position(|tool| tool.kind != "function") {
        let param = format!("tools[{index}].type");
        return Err(ApiError::invalid(
            param,
            "the type of a tool must be `function`",
        ));
    }
    if let Some(index) = tools
        .iter()
        .position(|tool| tool.function.strict == Some(true))
    {
        let param = format!("tools[{index}].function.strict");
        let message = "`strict` is not supported: answers are not held to a schema";
        return Err(ApiError::invalid(param, message));
    }
    match choice {
        None | Some(Value::Null) => Ok(tools),
        Some(Value::String(word)) if word == "auto" => Ok(tools),
        Some(Value::String(word)) if word == "none" => Ok(Vec::new()),
        Some(_) => Err(ApiError::invalid(
            "tool_choice",
            "`tool_choice` may be `auto` or `none`: the model cannot be forced to call",
        )),
    }
}

/// Variables for the template. The template's own switch wins over `reasoning_effort`.
fn template_variables(
    given: Option<Map<String, Value>>,
    effort: Option<&str>,
) -> Result<Map<String, Value>, ApiError> {
    let mut variables = given.unwrap_or_default();
    let thinking = match effort {
        None => return Ok(variables),
        Some("none") => false,
        Some("minimal" | "low" | "medium" | "high" | "xhigh") => true,
        Some(_) => {
            let message = "`reasoning_effort` must be none, minimal, low, medium, high or xhigh";
            return Err(ApiError::invalid("reasoning_effort", message));
        }
    };
    variables
        .entry("enable_thinking")
        .or_insert(thinking.into());
    Ok(variables)
}

/// The answer as chat completions spell it.
struct ChatAnswer {
    id: String,
    created: u64,
    model: String,
}

impl ChatAnswer {
    fn new(model: &str) -> Self {
        Self {
            id: new_id("chatcmpl-"),
            created: unix_seconds(),
            model: model.to_owned(),
        }
    }

    fn chunk(&self, choices: Vec<ChunkChoice>) -> ChatChunk {
        ChatChunk {
            id: self.id.clone(),
            object: "chat.completion.chunk".into(),
            created: self.created,
            model: self.model.clone(),
            choices,
            usage: None,
            timings: None,
        }
    }

    fn write(&self, delta: WireDelta, out: &mut Vec<u8>) {
        let choice = ChunkChoice {
            index: 0,
            delta,
            finish_reason: None,
            stop_reason: None,
        };
        write_data(out, &self.chunk(vec![choice]));
    }
}

impl Answer for ChatAnswer {
    fn open(&mut self, out: &mut Vec<u8>) {
        let delta = WireDelta {
            role: Some("assistant".into()),
            content: Some(String::new()),
            ..WireDelta::default()
        };
        self.write(delta, out);
    }

    fn delta(&mut self, delta: Delta, out: &mut Vec<u8>) {
        let mut wire = WireDelta::default();
        match delta {
            Delta::Content(text) => wire.content = Some(text),
            Delta::Reasoning(text) => wire.reasoning_content = Some(text),
            Delta::ToolCall {
                index,
                name,
                arguments,
            } => {
                wire.tool_calls = Some(vec![ToolCallDelta {
                    index,
                    id: Some(new_id("call_")),
                    kind: Some("function".into()),
                    function: FunctionCallDelta {
                        name: Some(name),
                        arguments: Some(arguments),
                    },
                }]);
            }
        }
        self.write(wire, out);
    }

    fn close(&mut self, finish: &Finish, usage: bool, out: &mut Vec<u8>) {
        let choice = ChunkChoice {
            index: 0,
            delta: WireDelta::default(),
            finish_reason: Some(finish.reason),
            stop_reason: finish.stop_string.clone(),
        };
        write_data(out, &self.chunk(vec![choice]));
        if usage {
            let chunk = ChatChunk {
                usage: Some(finish.usage),
                timings: Some(finish.timings),
                ..self.chunk(Vec::new())
            };
            write_data(out, &chunk);
        }
    }

    fn whole(self, whole: Whole) -> Response {
        let message = AssistantMessage {
            role: "assistant".into(),
            // Null only where calls take the place of text.
            content: (!whole.content.is_empty() || whole.calls.is_empty()).then_some(whole.content),
            reasoning_content: (!whole.reasoning.is_empty()).then_some(whole.reasoning),
            tool_calls: (!whole.calls.is_empty()).then_some(whole.calls),
        };
        axum::Json(ChatReply {
            id: self.id,
            object: "chat.completion".into(),
            created: self.created,
            model: self.model,
            choices: vec![Choice {
                index: 0,
                message,
                finish_reason: Some(whole.finish.reason),
                stop_reason: whole.finish.stop_string,
            }],
            usage: Some(whole.finish.usage),
            timings: Some(whole.finish.timings),
        })
        .into_response()
    }
}
