//! Token counts and times of one request.

use serde::{Deserialize, Serialize};

/// Tokens of one request as OpenAI reports them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Tokens of the rendered prompt.
    pub prompt_tokens: u64,
    /// Tokens generated, the end-of-turn token included.
    pub completion_tokens: u64,
    /// Sum of the two.
    pub total_tokens: u64,
    /// What the prompt tokens were made of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_tokens_details: Option<PromptTokensDetails>,
    /// What the completion tokens were made of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completion_tokens_details: Option<CompletionTokensDetails>,
}

/// Breakdown of the prompt tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromptTokensDetails {
    /// Tokens whose state was reused from an earlier request.
    #[serde(default)]
    pub cached_tokens: u64,
}

/// Breakdown of the completion tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CompletionTokensDetails {
    /// Tokens spent inside a thinking block.
    #[serde(default)]
    pub reasoning_tokens: u64,
    /// Tokens that were guessed ahead and held; part of the completion.
    #[serde(default)]
    pub accepted_prediction_tokens: u64,
    /// Tokens that were guessed ahead and did not hold; not part of the completion.
    #[serde(default)]
    pub rejected_prediction_tokens: u64,
}

impl Usage {
    /// Usage of a request that read `prompt` tokens and wrote `completion`.
    #[must_use]
    pub fn new(prompt: u64, completion: u64) -> Self {
        Self {
            prompt_tokens: prompt,
            completion_tokens: completion,
            total_tokens: prompt + completion,
            ..Self::default()
        }
    }

    /// Prompt tokens that came from a cache; zero when the upstream does not say.
    #[must_use]
    pub fn cached_tokens(&self) -> u64 {
        self.prompt_tokens_details.map_or(0, |d| d.cached_tokens)
    }
}

/// Where a request's time went on the node, in milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Timings {
    /// Waiting for the engine.
    pub queue_ms: f64,
    /// From the first to the last prompt token computed.
    pub prefill_ms: f64,
    /// From the first generated token to the last.
    pub decode_ms: f64,
}
