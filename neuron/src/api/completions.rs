//! `POST /v1/completions`.

use super::body::{self, Field, is};
use super::failure::Failure;
use super::fields::{self, CONTROLS, Given};
use super::generation::{
    self, Answer, Delivery, Origin, Total, Whole, find_model, in_background, new_id,
};
use super::scores::TextScores;
use super::{ApiState, RequestId, grammar};
use crate::engine::guide::{Guide, Scope};
use crate::engine::request::{Finish, Request};
use crate::residency::{ServedModel, unix_seconds};
use crate::text::output::{Delta, OutputOptions, Scored};
use crate::text::tokenizer::Tokenizer;
use axum::body::Body;
use axum::extract::{Extension, State};
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use protocol::ApiError;
use protocol::chat::{FinishReason, StreamOptions};
use protocol::completions::{CompletionChoice, CompletionReply, CompletionRequest, Prompt};
use protocol::sse::write_data;
use protocol::tokens::CompletionLogprobs;
use std::sync::Arc;
use std::time::Instant;

/// What OpenAI gives a completion that names no bound.
const DEFAULT_MAX_TOKENS: u64 = 16;

const FIELDS: &[Field] = &[
    ("model", is::<String>, "a string"),
    (
        "prompt",
        is::<Prompt>,
        "a string, a list of strings, a list of token ids or a list of such lists",
    ),
    ("stream", is::<Option<bool>>, "true or false"),
    ("stream_options", is::<Option<StreamOptions>>, "an object"),
    ("max_tokens", is::<Option<u64>>, "a whole number"),
    ("echo", is::<Option<bool>>, "true or false"),
    ("logprobs", is::<Option<u64>>, "a whole number from 0 to 20"),
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
    let wire: CompletionRequest = body::parse(&bytes, &[FIELDS, CONTROLS])?;
    let unknown_fields = fields::check(&wire.extra, &state.metrics)?;
    let delivery = Delivery::new(wire.stream, wire.stream_options, unknown_fields)?;
    let model = find_model(&state, &wire.model)?;
    let origin = Origin {
        id: request_id.0.clone(),
        arrived,
        deadline: arrived + state.limits.request_deadline,
    };
    let (served, most) = (model.clone(), state.limits.max_waiting);
    let prepared = in_background(move || prepare(wire, &served, origin, most)).await?;
    let answer = TextAnswer {
        id: new_id("cmpl-"),
        created: unix_seconds(),
        model: model.id.clone(),
        tokenizer: model.text.tokenizer.clone(),
        choices: prepared.choices,
    };
    let requests = (prepared.requests, prepared.per_prompt);
    generation::answer(&state, &model, requests, answer, delivery, &request_id).await
}

/// What a request comes to.
struct Prepared {
    requests: Vec<Request>,
    per_prompt: usize,
    choices: Vec<TextChoice>,
}

fn prepare(
    wire: CompletionRequest,
    model: &ServedModel,
    origin: Origin,
    most: usize,
) -> Result<Prepared, ApiError> {
    let text = &model.text;
    let mut checked = Given {
        temperature: wire.temperature,
        top_p: wire.top_p,
        top_k: wire.top_k,
        min_p: wire.min_p,
        seed: wire.seed,
        stop: wire.stop,
        logprobs: wire.logprobs,
        user: wire.user,
        controls: wire.controls,
    }
    .checked(text, origin)
    .map_err(|error| renamed(error, "top_logprobs", "logprobs"))?;
    let prompts = prompts(wire.prompt, &text.tokenizer)?;
    fields::not_too_many("prompt", prompts.len().saturating_mul(checked.count), most)?;
    let grammar = match checked.shape.take() {
        Some(asked) => Some((grammar::compile(text, asked)?, Scope::Answer)),
        None => None,
    };
    let guide = Guide::new(None, grammar, Arc::default());
    let echo = wire.echo.unwrap_or(false);
    let wanted = ("max_tokens", wire.max_tokens.or(Some(DEFAULT_MAX_TOKENS)));
    if !echo {
        fields::not_zero(wanted)?;
    }
    let score_prompt = echo && wire.logprobs.is_some();
    let (mut requests, mut choices) = (Vec::new(), Vec::new());
    for prompt in prompts {
        let least = checked.sampling.min_tokens();
        let max_tokens = match wanted.1 {
            // Scoring a text needs no room behind it.
            Some(0) if prompt.len() <= model.context_length => 0,
            _ => fields::max_tokens(
                wanted.1,
                "prompt",
                prompt.len(),
                model.context_length,
                least,
            )?,
        };
        for request in checked.requests(model, &prompt, max_tokens, &guide, OutputOptions::default)
        {
            requests.push(Request {
                score_prompt,
                ..request
            });
            choices.push(TextChoice {
                logprobs: wire.logprobs.is_some(),
                echo: echo.then(|| prompt.clone()),
                prompt_due: score_prompt,
                ..TextChoice::default()
            });
        }
    }
    Ok(Prepared {
        requests,
        per_prompt: checked.count,
        choices,
    })
}

/// A field has another name here than where it was checked.
fn renamed(mut error: ApiError, there: &str, here: &str) -> ApiError {
    if error.param.as_deref() == Some(there) {
        error.param = Some(here.into());
        error.message = error.message.replace(there, here);
    }
    error
}

fn prompts(prompt: Prompt, tokenizer: &Tokenizer) -> Result<Vec<Vec<u32>>, ApiError> {
    let encode = |text: &String| {
        tokenizer
            .encode(text)
            .map_err(|error| ApiError::invalid("prompt", error.to_string()))
    };
    let prompts = match prompt {
        Prompt::Text(text) => vec![encode(&text)?],
        Prompt::Texts(texts) => texts.iter().map(encode).collect::<Result<_, _>>()?,
        Prompt::Ids(ids) => vec![ids],
        Prompt::IdLists(lists) => lists,
    };
    if prompts.is_empty() || prompts.iter().any(Vec::is_empty) {
        return Err(ApiError::invalid("prompt", "`prompt` is empty"));
    }
    for ids in &prompts {
        fields::known("prompt", ids, tokenizer)?;
    }
    Ok(prompts)
}

/// The answer as text completions spell it: one shape for the whole and for each event.
struct TextAnswer {
    id: String,
    created: u64,
    model: String,
    tokenizer: Arc<Tokenizer>,
    choices: Vec<TextChoice>,
}

/// One choice on its way out.
#[derive(Default)]
struct TextChoice {
    /// Log probabilities are given.
    logprobs: bool,
    /// The prompt, which the text begins with.
    echo: Option<Vec<u32>>,
    /// The prompt's scores are still to come, and it waits for them.
    prompt_due: bool,
    /// Knows where in the text the next token begins.
    scores: TextScores,
    /// Scores of tokens that no event has taken yet.
    pending: Vec<Scored>,
}

impl TextChoice {
    /// The prompt's text and scores.
    fn prompt(
        &mut self,
        tokenizer: &Tokenizer,
        scores: &[Option<Scored>],
    ) -> (String, Option<CompletionLogprobs>) {
        let ids = self.echo.take().unwrap_or_default();
        let logprobs = self
            .logprobs
            .then(|| self.scores.prompt(tokenizer, &ids, scores));
        (tokenizer.spell(&ids), logprobs)
    }
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

    fn write(
        &mut self,
        index: usize,
        text: String,
        finish_reason: Option<FinishReason>,
        out: &mut Vec<u8>,
    ) {
        let choice = &mut self.choices[index];
        let pending = std::mem::take(&mut choice.pending);
        let logprobs = (!pending.is_empty()).then(|| {
            let mut logprobs = CompletionLogprobs::default();
            choice
                .scores
                .answer(&self.tokenizer, &pending, &mut logprobs);
            logprobs
        });
        self.write_scored(index, text, logprobs, finish_reason, out);
    }

    fn write_scored(
        &self,
        index: usize,
        text: String,
        logprobs: Option<CompletionLogprobs>,
        finish_reason: Option<FinishReason>,
        out: &mut Vec<u8>,
    ) {
        let choice = CompletionChoice {
            index: number(index),
            text,
            logprobs,
            finish_reason,
        };
        write_data(out, &self.reply(vec![choice]));
    }
}

fn number(index: usize) -> u32 {
    u32::try_from(index).expect("the number of answers is bounded")
}

impl Answer for TextAnswer {
    fn open(&mut self, out: &mut Vec<u8>) {
        for index in 0..self.choices.len() {
            let choice = &mut self.choices[index];
            if choice.echo.is_some() && !choice.prompt_due {
                let (text, _) = choice.prompt(&self.tokenizer, &[]);
                self.write(index, text, None, out);
            }
        }
    }

    fn delta(&mut self, index: usize, delta: Delta, out: &mut Vec<u8>) {
        match delta {
            Delta::Prompt(scores) => {
                let (text, logprobs) = self.choices[index].prompt(&self.tokenizer, &scores);
                self.write_scored(index, text, logprobs, None, out);
            }
            // They go with the next text, or with the end.
            Delta::Scored(scored) => self.choices[index].pending.push(scored),
            Delta::Content(text) => self.write(index, text, None, out),
            // Neither thinking nor calls are told apart in a text completion.
            Delta::Reasoning(_) | Delta::ToolCall { .. } => {}
        }
    }

    fn close(&mut self, index: usize, finish: &Finish, out: &mut Vec<u8>) {
        self.write(index, String::new(), Some(finish.reason), out);
    }

    fn usage(&mut self, total: &Total, out: &mut Vec<u8>) {
        let reply = CompletionReply {
            usage: Some(total.usage),
            timings: Some(total.timings),
            ..self.reply(Vec::new())
        };
        write_data(out, &reply);
    }

    fn whole(mut self, answers: Vec<(Whole, Finish)>, total: &Total) -> Response {
        let mut choices = Vec::with_capacity(answers.len());
        for (index, (whole, finish)) in answers.into_iter().enumerate() {
            let choice = &mut self.choices[index];
            let (mut text, logprobs) = choice.prompt(&self.tokenizer, &whole.prompt);
            text.push_str(&whole.content);
            let logprobs = logprobs.map(|mut logprobs| {
                choice
                    .scores
                    .answer(&self.tokenizer, &whole.scored, &mut logprobs);
                logprobs
            });
            choices.push(CompletionChoice {
                index: number(index),
                text,
                logprobs,
                finish_reason: Some(finish.reason),
            });
        }
        axum::Json(CompletionReply {
            usage: Some(total.usage),
            timings: Some(total.timings),
            ..self.reply(choices)
        })
        .into_response()
    }
}
