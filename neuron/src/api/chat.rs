//! `POST /v1/chat/completions`.

use super::body::{self, Field, is};
use super::failure::{Failure, template};
use super::fields::{self, CONTROLS, Given};
use super::generation::{
    self, Answer, Delivery, Origin, Total, Whole, find_model, in_background, new_id,
};
use super::grammar::Asked;
use super::{ApiState, RequestId, grammar, scores};
use crate::engine::guide::{Guide, Scope, ThinkingBudget};
use crate::engine::request::{Finish, Request};
use crate::residency::folder::ModelText;
use crate::residency::{ServedModel, unix_seconds};
use crate::text::grammar::{Grammar, Shape};
use crate::text::output::{Delta, OutputOptions, Scored};
use crate::text::reasoning::ThinkTags;
use crate::text::template::Conversation;
use crate::text::tokenizer::Tokenizer;
use axum::body::Body;
use axum::extract::{Extension, State};
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use protocol::ApiError;
use protocol::chat::{
    AssistantMessage, ChatChunk, ChatReply, ChatRequest, Choice, ChunkChoice, Content,
    Delta as WireDelta, FunctionCallDelta, Message, Part, StreamOptions, Tool, ToolCallDelta,
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
    (
        "tools",
        is::<Option<Vec<Tool>>>,
        "a list of tools of type `function`",
    ),
    ("parallel_tool_calls", is::<Option<bool>>, "true or false"),
    ("reasoning_effort", is::<Option<String>>, "a string"),
    ("enable_thinking", is::<Option<bool>>, "true or false"),
    ("thinking_budget", is::<Option<u64>>, "a number of tokens"),
    (
        "thinking_token_budget",
        is::<Option<u64>>,
        "a number of tokens",
    ),
    (
        "chat_template_kwargs",
        is::<Option<Map<String, Value>>>,
        "an object",
    ),
    ("logprobs", is::<Option<bool>>, "true or false"),
    (
        "top_logprobs",
        is::<Option<u64>>,
        "a whole number from 0 to 20",
    ),
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
    let wire: ChatRequest = body::parse(&bytes, &[FIELDS, CONTROLS])?;
    let unknown_fields = fields::check(&wire.extra, &state.metrics)?;
    let delivery = Delivery::new(wire.stream, wire.stream_options, unknown_fields)?;
    let model = find_model(&state, &wire.model)?;
    let origin = Origin {
        id: request_id.0.clone(),
        arrived,
        deadline: arrived + state.limits.request_deadline,
    };
    let (served, most) = (model.clone(), state.limits.max_waiting);
    let requests = in_background(move || prepare(wire, &served, origin, most)).await?;
    let count = requests.len();
    let answer = ChatAnswer::new(&model, count);
    generation::answer(
        &state,
        &model,
        (requests, count),
        answer,
        delivery,
        &request_id,
    )
    .await
}

/// Everything that can be wrong with a request is found here.
fn prepare(
    wire: ChatRequest,
    model: &ServedModel,
    origin: Origin,
    most: usize,
) -> Result<Vec<Request>, ApiError> {
    let text = &model.text;
    let logprobs = wire.logprobs.unwrap_or(false);
    if wire.top_logprobs.is_some_and(|count| count > 0) && !logprobs {
        let message = "`top_logprobs` is only for `logprobs: true`";
        return Err(ApiError::invalid("top_logprobs", message));
    }
    let mut checked = Given {
        temperature: wire.temperature,
        top_p: wire.top_p,
        top_k: wire.top_k,
        min_p: wire.min_p,
        seed: wire.seed,
        stop: wire.stop,
        logprobs: logprobs.then(|| wire.top_logprobs.unwrap_or(0)),
        user: wire.user,
        controls: wire.controls,
    }
    .checked(text, origin)?;
    fields::not_too_many("n", checked.count, most)?;
    check_messages(&wire.messages)?;
    let one_call = wire.parallel_tool_calls == Some(false);
    let (tools, choice) = offered_tools(wire.tools, wire.tool_choice.as_ref())?;
    let shape = checked.shape.take();
    let grammar = held_to(text, shape, &tools, &choice, !one_call)?;
    let variables = template_variables(
        wire.chat_template_kwargs,
        wire.reasoning_effort.as_deref(),
        wire.enable_thinking,
    )?;
    let prompt = text
        .template
        .render(&Conversation {
            messages: &wire.messages,
            tools: &tools,
            add_generation_prompt: true,
            variables: &variables,
        })
        .map_err(template)?;
    let ids = encode(text, &prompt)?;
    if ids.is_empty() {
        return Err(ApiError::invalid("messages", "the prompt is empty"));
    }
    let wanted = match wire.max_completion_tokens {
        Some(wanted) => ("max_completion_tokens", Some(wanted)),
        None => ("max_tokens", wire.max_tokens),
    };
    fields::not_zero(wanted)?;
    let least = checked.sampling.min_tokens();
    let max_tokens =
        fields::max_tokens(wanted.1, "messages", ids.len(), model.context_length, least)?;
    let guide = guide(text, wire.thinking_budget, grammar)?;
    let tools: Option<Arc<[Tool]>> = (!tools.is_empty()).then(|| tools.into());
    let options = || OutputOptions {
        thinking: Some(ThinkTags::opened_by(&prompt)),
        one_call,
        tools: tools.clone().map(|tools| (text.tool_form, tools)),
        ..OutputOptions::default()
    };
    Ok(checked.requests(model, &ids, max_tokens, &guide, options))
}

fn encode(text: &ModelText, prompt: &str) -> Result<Vec<u32>, ApiError> {
    text.tokenizer
        .encode(prompt)
        .map_err(|error| ApiError::invalid("messages", error.to_string()))
}

fn guide(
    text: &ModelText,
    budget: Option<u64>,
    grammar: Option<(Grammar, Scope)>,
) -> Result<Guide, ApiError> {
    /// How models end a thought, and what of it stands before the answer.
    const END: &str = "\n</think>\n\n";
    const GAP: &str = "\n\n";
    let close: Arc<[u32]> = encode(text, END)?.into();
    let budget = budget.map(|tokens| ThinkingBudget { tokens, close });
    Ok(Guide::new(budget, grammar, encode(text, GAP)?.into()))
}

pub(super) fn check_messages(messages: &[Message]) -> Result<(), ApiError> {
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

/// Which tools the model may call, and whether it must.
enum ToolChoice {
    /// As it likes.
    Free,
    /// At least one, of all.
    Required,
    /// At least one, of this alone.
    Named(String),
}

/// The tools the model is told about, and its choice among them.
fn offered_tools(
    tools: Option<Vec<Tool>>,
    choice: Option<&Value>,
) -> Result<(Vec<Tool>, ToolChoice), ApiError> {
    let wrong = |message: String| Err(ApiError::invalid("tool_choice", message));
    let tools = tools.unwrap_or_default();
    if let Some(index) = tools.iter().position(|tool| tool.kind != "function") {
        let param = format!("tools[{index}].type");
        return Err(ApiError::invalid(
            param,
            "the type of a tool must be `function`",
        ));
    }
    let choice = match choice {
        None | Some(Value::Null) => ToolChoice::Free,
        Some(Value::String(word)) if word == "auto" => ToolChoice::Free,
        Some(Value::String(word)) if word == "none" => return Ok((Vec::new(), ToolChoice::Free)),
        Some(Value::String(word)) if word == "required" => ToolChoice::Required,
        Some(named) if named["type"] == "function" => match named["function"]["name"].as_str() {
            Some(name) if tools.iter().any(|tool| tool.function.name == name) => {
                ToolChoice::Named(name.to_owned())
            }
            Some(name) => {
                return wrong(format!(
                    "`tool_choice` names `{name}`, which is not in `tools`"
                ));
            }
            None => return wrong("`tool_choice.function.name` must be a string".into()),
        },
        Some(_) => {
            return wrong(
                "`tool_choice` must be auto, none, required or {\"type\": \"function\", \"function\": {\"name\": …}}".into(),
            );
        }
    };
    if tools.is_empty() && !matches!(choice, ToolChoice::Free) {
        return wrong("`tool_choice` asks for a call, and there are no `tools`".into());
    }
    Ok((tools, choice))
}

/// What holds the answer to a shape, and the calls in it to their tools.
fn held_to(
    text: &ModelText,
    asked: Option<Asked>,
    tools: &[Tool],
    choice: &ToolChoice,
    several: bool,
) -> Result<Option<(Grammar, Scope)>, ApiError> {
    let form = text.tool_form;
    let strict = tools.iter().any(|tool| tool.function.strict == Some(true));
    let (shape, field, scope) = match (choice, asked) {
        // The answer is calls alone: no other shape bears on it.
        (ToolChoice::Required, _) => (form.shape(tools, None, several), "tools", Scope::Answer),
        (ToolChoice::Named(name), _) => (
            form.shape(tools, Some(name), several),
            "tools",
            Scope::Answer,
        ),
        (ToolChoice::Free, Some((shape, field))) if tools.is_empty() => {
            (Some(shape), field, Scope::Answer)
        }
        (ToolChoice::Free, Some((Shape::JsonSchema(schema), field))) => (
            form.shape_or_json(tools, several, schema),
            field,
            Scope::Answer,
        ),
        (ToolChoice::Free, Some((_, field))) => {
            let message =
                format!("`{field}` would keep the model from calling: leave out it or `tools`");
            return Err(ApiError::invalid(field, message));
        }
        (ToolChoice::Free, None) if strict => (form.block_shape(tools), "tools", Scope::Calls),
        (ToolChoice::Free, None) => return Ok(None),
    };
    let Some(shape) = shape else {
        return Ok(None);
    };
    Ok(Some((grammar::compile(text, (shape, field))?, scope)))
}

/// Variables for the template. The template's own switch wins over `enable_thinking`, and that over `reasoning_effort`.
pub(super) fn template_variables(
    given: Option<Map<String, Value>>,
    effort: Option<&str>,
    enable_thinking: Option<bool>,
) -> Result<Map<String, Value>, ApiError> {
    let mut variables = given.unwrap_or_default();
    if let Some(thinking) = enable_thinking {
        variables
            .entry("enable_thinking")
            .or_insert(thinking.into());
    }
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
    tokenizer: Arc<Tokenizer>,
    /// Of each choice the scores that no chunk has taken yet.
    scores: Vec<Vec<Scored>>,
}

impl ChatAnswer {
    fn new(model: &ServedModel, count: usize) -> Self {
        Self {
            id: new_id("chatcmpl-"),
            created: unix_seconds(),
            model: model.id.clone(),
            tokenizer: model.text.tokenizer.clone(),
            scores: vec![Vec::new(); count],
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

    fn write(
        &mut self,
        index: usize,
        delta: WireDelta,
        finish: Option<&Finish>,
        out: &mut Vec<u8>,
    ) {
        let scores = std::mem::take(&mut self.scores[index]);
        let choice = ChunkChoice {
            index: number(index),
            delta,
            logprobs: scores::chat(&self.tokenizer, &scores),
            finish_reason: finish.map(|finish| finish.reason),
            stop_reason: finish.and_then(|finish| finish.stop_string.clone()),
        };
        write_data(out, &self.chunk(vec![choice]));
    }
}

fn number(index: usize) -> u32 {
    u32::try_from(index).expect("the number of answers is bounded")
}

impl Answer for ChatAnswer {
    fn open(&mut self, out: &mut Vec<u8>) {
        for index in 0..self.scores.len() {
            let delta = WireDelta {
                role: Some("assistant".into()),
                content: Some(String::new()),
                ..WireDelta::default()
            };
            self.write(index, delta, None, out);
        }
    }

    fn delta(&mut self, index: usize, delta: Delta, out: &mut Vec<u8>) {
        let mut wire = WireDelta::default();
        match delta {
            // Nobody can ask for the first here.
            Delta::Prompt(_) => return,
            // They go with the next text, or with the end.
            Delta::Scored(scored) => return self.scores[index].push(scored),
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
        self.write(index, wire, None, out);
    }

    fn close(&mut self, index: usize, finish: &Finish, out: &mut Vec<u8>) {
        self.write(index, WireDelta::default(), Some(finish), out);
    }

    fn usage(&mut self, total: &Total, out: &mut Vec<u8>) {
        let chunk = ChatChunk {
            usage: Some(total.usage),
            timings: Some(total.timings),
            ..self.chunk(Vec::new())
        };
        write_data(out, &chunk);
    }

    fn whole(self, answers: Vec<(Whole, Finish)>, total: &Total) -> Response {
        let choices = answers
            .into_iter()
            .enumerate()
            .map(|(index, (whole, finish))| {
                let message = AssistantMessage {
                    role: "assistant".into(),
                    // Null only where calls take the place of text.
                    content: (!whole.content.is_empty() || whole.calls.is_empty())
                        .then_some(whole.content),
                    reasoning_content: (!whole.reasoning.is_empty()).then_some(whole.reasoning),
                    tool_calls: (!whole.calls.is_empty()).then_some(whole.calls),
                };
                Choice {
                    index: number(index),
                    message,
                    logprobs: scores::chat(&self.tokenizer, &whole.scored),
                    finish_reason: Some(finish.reason),
                    stop_reason: finish.stop_string,
                }
            });
        axum::Json(ChatReply {
            choices: choices.collect(),
            id: self.id,
            object: "chat.completion".into(),
            created: self.created,
            model: self.model,
            usage: Some(total.usage),
            timings: Some(total.timings),
        })
        .into_response()
    }
}
