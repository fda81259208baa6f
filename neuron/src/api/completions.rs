//! `POST /v1/completions`.

use super::body::{self, Field, is};
use super::failure::Failure;
use super::fields::{self, Sampling};
use super::generation::{self, Answer, Delivery, Origin, Whole, find_model, in_background, new_id};
use super::{ApiState, RequestId};
use crate::engine::request::{Finish, Request};
use crate::residency::{ServedModel, unix_seconds};
use crate::text::output::{Delta, Output, OutputOptions};
use crate::text::tokenizer::Tokenizer;
use axum::body::Body;
use axum::extract::{Extension, State};
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use protocol::ApiError;
use protocol::chat::{FinishReason, StopStrings, StreamOptions};
use protocol::completions::{CompletionChoice, CompletionReply, CompletionRequest, Prompt};
use protocol::sse::write_data;
use std::sync::Arc;
use std::time::Instant;

/// What OpenAI gives a completion that names no bound.
const DEFAULT_MAX_TOKENS: u64 = 16;

const FIELDS: &[Field] = &[
    ("model", is::<String>, "a string"),
    ("prompt", is::<Prompt>, "a string or a list of token ids"),
    ("stream", is::<Option<bool>>, "true or false"),
    ("stream_options", is::<Option<StreamOptions>>, "an object"),
    ("max_tokens", is::<Option<u64>>, "a whole number, 1 or more"),
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
    ("user", is::<Option<String>>, "a string"),
];

/// Checks, tokenises, generates.
pub(super) async fn complete(
    State(state): State<Arc<ApiState>>,
    Extension(request_id): Extension<RequestId>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Failure> {
    let arrived = Instant::now();
    let bytes = body::read(&headers, body, state.limits.max_body_bytes).await?;
    let wire: CompletionRequest = body::parse(&bytes, FIELDS)?;
    let unknown_fields = fields::check(&wire.extra, &state.metrics)?;
    let delivery = Delivery::new(wire.stream, wire.stream_options, &headers, unknown_fields)?;
    let model = find_model(&state, &wire.model)?;
    let answer = TextAnswer {
        id: new_id("cmpl-"),
        created: unix_seconds(),
        model: wire.model.clone(),
    };
    let origin = Origin {
        id: request_id.0.clone(),
        arrived,
        deadline: arrived + state.limits.request_deadline,
    };
    let served = model.clone();
    let request = in_background(move || prepare(wire, &served, origin)).await?;
    generation::answer(&model, request, answer, delivery, &request_id).await
}

fn prepare(
    wire: CompletionRequest,
    model: &ServedModel,
    origin: Origin,
) -> Result<Request, ApiError> {
    let sampling = Sampling {
        temperature: wire.temperature,
        top_p: wire.top_p,
        top_k: wire.top_k,
        min_p: wire.min_p,
        seed: wire.seed,
    };
    let sampling = sampling.checked(model.text.sampling)?;
    let stop = fields::stop_strings(wire.stop)?;
    let prompt = prompt_ids(wire.prompt, &model.text.tokenizer)?;
    let wanted = ("max_tokens", wire.max_tokens.or(Some(DEFAULT_MAX_TOKENS)));
    let max_tokens = fields::max_tokens(wanted, prompt.len(), model.context_length)
        .map_err(|error| at_prompt(error, "messages"))?;
    let options = OutputOptions {
        stop,
        ..OutputOptions::default()
    };
    Ok(Request {
        id: origin.id,
        arrived: origin.arrived,
        deadline: origin.deadline,
        prompt,
        max_tokens,
        sampling,
        output: Output::new(model.text.tokenizer.clone(), options),
    })
}

/// The prompt's field has another name here than in chat.
fn at_prompt(mut error: ApiError, chat_name: &str) -> ApiError {
    if error.param.as_deref() == Some(chat_name) {
        error.param = Some("prompt".into());
    }
    error
}

fn prompt_ids(prompt: Prompt, tokenizer: &Tokenizer) -> Result<Vec<u32>, ApiError> {
    let wrong = |message: String| ApiError::invalid("prompt", message);
    let several =
        || wrong("one prompt per request: send several requests, they run together".into());
    let only = |mut list: Vec<String>| {
        let text = list
            .pop()
            .ok_or_else(|| wrong("`prompt` is empty".into()))?;
        if list.is_empty() {
            Ok(text)
        } else {
            Err(several())
        }
    };
    let ids = match prompt {
        Prompt::Text(text) => encode(&text, tokenizer)?,
        Prompt::Texts(texts) => encode(&only(texts)?, tokenizer)?,
        Prompt::Ids(ids) => ids,
        Prompt::IdLists(lists) if lists.len() > 1 => return Err(several()),
        Prompt::IdLists(lists) => lists.into_iter().flatten().collect(),
    };
    if ids.is_empty() {
        return Err(wrong("`prompt` is empty".into()));
    }
    let known = tokenizer.vocab_size();
    if let Some(id) = ids.iter().find(|id| **id as usize >= known) {
        return Err(wrong(format!(
            "there is no token {id}: ids go up to {}",
            known - 1
        )));
    }
    Ok(ids)
}

fn encode(text: &str, tokenizer: &Tokenizer) -> Result<Vec<u32>, ApiError> {
    tokenizer
        .encode(text)
        .map_err(|error| ApiError::invalid("prompt", error.to_string()))
}

/// The answer as text completions spell it: one shape for the whole and for each event.
struct TextAnswer {
    id: String,
    created: u64,
    model: String,
}

impl TextAnswer {
    fn reply(&self, choices: Vec<CompletionChoice>) -> CompletionReply {
        CompletionReply {
            id: self.id.clone(),
            object: "text_completion".into(),
            created: self.created,
            model: self.model.clone(),
            choices,
            usage: None,
            timings: None,
        }
    }

    fn choice(text: String, finish_reason: Option<FinishReason>) -> CompletionChoice {
        CompletionChoice {
            index: 0,
            text,
            logprobs: None,
            finish_reason,
        }
    }
}

impl Answer for TextAnswer {
    fn open(&mut self, _out: &mut Vec<u8>) {}

    fn delta(&mut self, delta: Delta, out: &mut Vec<u8>) {
        // Neither thinking nor calls are told apart in a text completion, so there is content alone.
        if let Delta::Content(text) = delta {
            write_data(out, &self.reply(vec![Self::choice(text, None)]));
        }
    }

    fn close(&mut self, finish: &Finish, usage: bool, out: &mut Vec<u8>) {
        let last = Self::choice(String::new(), Some(finish.reason));
        write_data(out, &self.reply(vec![last]));
        if usage {
            let reply = CompletionReply {
                usage: Some(finish.usage),
                timings: Some(finish.timings),
                ..self.reply(Vec::new())
            };
            write_data(out, &reply);
        }
    }

    fn whole(self, whole: Whole) -> Response {
        let choice = Self::choice(whole.content, Some(whole.finish.reason));
        axum::Json(CompletionReply {
            usage: Some(whole.finish.usage),
            timings: Some(whole.finish.timings),
            ..self.reply(vec![choice])
        })
        .into_response()
    }
}
