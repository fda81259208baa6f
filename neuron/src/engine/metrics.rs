//! What the engines tell Prometheus. Names follow vLLM's with our prefix, so that its dashboards carry over.

use super::request::Finish;
use prometheus::core::Collector;
use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry,
};

/// The families, with a label for the model.
#[derive(Debug, Clone)]
pub struct EngineMetrics {
    running: IntGaugeVec,
    waiting: IntGaugeVec,
    queue: HistogramVec,
    first_token: HistogramVec,
    inter_token: HistogramVec,
    whole: HistogramVec,
    prefill: HistogramVec,
    decode: HistogramVec,
    prompt_length: HistogramVec,
    answer_length: HistogramVec,
    reasoning_tokens: IntCounterVec,
    mask: HistogramVec,
    prompt_tokens: IntCounterVec,
    generation_tokens: IntCounterVec,
    success: IntCounterVec,
    failed: IntCounterVec,
    rejected: IntCounterVec,
    cancelled: IntCounterVec,
    preemptions: IntCounterVec,
    cache_queries: IntCounterVec,
    cache_hits: IntCounterVec,
    snapshots_saved: IntCounterVec,
    snapshots_evicted: IntCounterVec,
    snapshots_spilled: IntCounterVec,
    snapshot_bytes: IntGaugeVec,
    host_snapshot_bytes: IntGaugeVec,
    drafted: IntCounterVec,
    accepted: IntCounterVec,
    blocks: IntGaugeVec,
    blocks_used: IntGaugeVec,
    blocks_in_sequences: IntGaugeVec,
    steps: HistogramVec,
    step_tokens: IntCounterVec,
}

/// The families of one model.
#[derive(Debug, Clone)]
pub struct ModelMetrics {
    model: String,
    all: EngineMetrics,
    /// Sequences with a state.
    pub running: IntGauge,
    /// Requests that have not begun.
    pub waiting: IntGauge,
    /// From arrival to the first step.
    pub queue: Histogram,
    /// From arrival to the first token.
    pub first_token: Histogram,
    /// Between two tokens of one answer.
    pub inter_token: Histogram,
    /// From arrival to the end.
    pub whole: Histogram,
    /// From the first step to the first token, of answered requests.
    pub prefill: Histogram,
    /// From the first token to the last, of answered requests.
    pub decode: Histogram,
    /// Prompt tokens of an answered request.
    pub prompt_length: Histogram,
    /// Tokens of an answer.
    pub answer_length: Histogram,
    /// Tokens sampled inside thinking blocks, of answered requests.
    pub reasoning_tokens: IntCounter,
    /// Finding out which tokens a grammar allows next.
    pub mask: Histogram,
    /// Prompt tokens of requests that began.
    pub prompt_tokens: IntCounter,
    /// Tokens sampled.
    pub generation_tokens: IntCounter,
    /// Sequences set back to make room.
    pub preemptions: IntCounter,
    /// Tokens of sequences that began, looked for among what others had left.
    pub cache_queries: IntCounter,
    /// Those of them that were found.
    pub cache_hits: IntCounter,
    /// States saved for others.
    pub snapshots_saved: IntCounter,
    /// Saved states let go.
    pub snapshots_evicted: IntCounter,
    /// Saved states moved from a device to the host.
    pub snapshots_spilled: IntCounter,
    /// What saved states hold.
    pub snapshot_bytes: IntGauge,
    /// What those hold that were moved to the host.
    pub host_snapshot_bytes: IntGauge,
    /// Tokens guessed ahead.
    pub drafted: IntCounter,
    /// Those of them that held.
    pub accepted: IntCounter,
    /// Blocks of keys and values there can be.
    pub blocks: IntGauge,
    /// Blocks that hold something.
    pub blocks_used: IntGauge,
    /// Those of running sequences.
    pub blocks_in_sequences: IntGauge,
}

const SECONDS: [f64; 16] = [
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0,
];

const TOKENS: [f64; 12] = [
    1.0, 4.0, 16.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 4096.0, 16384.0, 65536.0, 262_144.0,
];

impl EngineMetrics {
    /// Registers the families.
    ///
    /// # Panics
    /// When they are registered twice in one registry.
    #[must_use]
    pub fn register(registry: &Registry) -> Self {
        let gauge = |name: &str, help: &str| {
            add(
                registry,
                IntGaugeVec::new(Opts::new(name, help), &["model"]),
            )
        };
        let counter = |name: &str, help: &str, labels: &[&str]| {
            add(registry, IntCounterVec::new(Opts::new(name, help), labels))
        };
        let seconds = |name: &str, help: &str, labels: &[&str]| {
            let options = HistogramOpts::new(name, help).buckets(SECONDS.to_vec());
            add(registry, HistogramVec::new(options, labels))
        };
        let tokens = |name: &str, help: &str| {
            let options = HistogramOpts::new(name, help).buckets(TOKENS.to_vec());
            add(registry, HistogramVec::new(options, &["model"]))
        };
        Self {
            running: gauge("neuron_requests_running", "Sequences that hold a state."),
            waiting: gauge("neuron_requests_waiting", "Requests that have not begun."),
            queue: seconds(
                "neuron_request_queue_time_seconds",
                "From a request's arrival to its first step.",
                &["model"],
            ),
            first_token: seconds(
                "neuron_time_to_first_token_seconds",
                "From a request's arrival to its first token.",
                &["model"],
            ),
            inter_token: seconds(
                "neuron_inter_token_latency_seconds",
                "Between two tokens of one answer.",
                &["model"],
            ),
            whole: seconds(
                "neuron_e2e_request_latency_seconds",
                "From a request's arrival to its end.",
                &["model"],
            ),
            prefill: seconds(
                "neuron_request_prefill_time_seconds",
                "From a request's first step to its first token.",
                &["model"],
            ),
            decode: seconds(
                "neuron_request_decode_time_seconds",
                "From a request's first token to its last.",
                &["model"],
            ),
            prompt_length: tokens(
                "neuron_request_prompt_tokens",
                "Prompt tokens of an answered request.",
            ),
            answer_length: tokens("neuron_request_generation_tokens", "Tokens of an answer."),
            reasoning_tokens: counter(
                "neuron_reasoning_tokens_total",
                "Tokens sampled inside thinking blocks of answered requests.",
                &["model"],
            ),
            mask: seconds(
                "neuron_grammar_mask_seconds",
                "Finding out which tokens a grammar allows next.",
                &["model"],
            ),
            prompt_tokens: counter(
                "neuron_prompt_tokens_total",
                "Prompt tokens of requests that began.",
                &["model"],
            ),
            generation_tokens: counter(
                "neuron_generation_tokens_total",
                "Tokens sampled.",
                &["model"],
            ),
            success: counter(
                "neuron_request_success_total",
                "Requests answered, by why the answer ended.",
                &["model", "finished_reason"],
            ),
            failed: counter(
                "neuron_request_failed_total",
                "Requests that ended in an error after they were taken.",
                &["model", "reason"],
            ),
            rejected: counter(
                "neuron_request_rejected_total",
                "Requests that were not taken.",
                &["model", "reason"],
            ),
            cancelled: counter(
                "neuron_cancelled_total",
                "Requests whose client left, by what they were doing.",
                &["model", "phase"],
            ),
            preemptions: counter(
                "neuron_preemptions_total",
                "Sequences set back to make room for older ones.",
                &["model"],
            ),
            cache_queries: counter(
                "neuron_prefix_cache_queries_total",
                "Tokens of sequences that began, looked for among what others had left.",
                &["model"],
            ),
            cache_hits: counter(
                "neuron_prefix_cache_hits_total",
                "Tokens of sequences that began that others had left, and were not computed again.",
                &["model"],
            ),
            snapshots_saved: counter(
                "neuron_snapshots_saved_total",
                "States of sequences saved for others that begin alike.",
                &["model"],
            ),
            snapshots_evicted: counter(
                "neuron_snapshots_evicted_total",
                "Saved states let go to make room.",
                &["model"],
            ),
            snapshots_spilled: counter(
                "neuron_snapshots_spilled_total",
                "Saved states moved from a device to the host's memory to make room.",
                &["model"],
            ),
            host_snapshot_bytes: gauge(
                "neuron_host_snapshot_bytes",
                "Bytes of saved states that were moved from a device to the host's memory.",
            ),
            drafted: counter(
                "neuron_spec_decode_num_draft_tokens_total",
                "Tokens guessed ahead of sequences that write.",
                &["model"],
            ),
            accepted: counter(
                "neuron_spec_decode_num_accepted_tokens_total",
                "Tokens guessed ahead that held.",
                &["model"],
            ),
            snapshot_bytes: gauge("neuron_snapshot_bytes", "Bytes of saved states."),
            blocks: gauge(
                "neuron_kv_blocks",
                "Blocks of keys and values there can be.",
            ),
            blocks_used: gauge(
                "neuron_kv_blocks_used",
                "Blocks of keys and values that hold something, of running sequences or for later ones.",
            ),
            blocks_in_sequences: gauge(
                "neuron_kv_blocks_in_sequences",
                "Blocks of keys and values that running sequences hold; one that several share counts for each.",
            ),
            steps: seconds(
                "neuron_step_seconds",
                "One step of the model: decode, prefill or mixed.",
                &["model", "kind"],
            ),
            step_tokens: counter(
                "neuron_step_tokens_total",
                "Rows the model computed, by kind.",
                &["model", "kind"],
            ),
        }
    }

    /// The families of `model`.
    #[must_use]
    pub fn of(&self, model: &str) -> ModelMetrics {
        let label = &[model];
        ModelMetrics {
            model: model.to_owned(),
            all: self.clone(),
            running: self.running.with_label_values(label),
            waiting: self.waiting.with_label_values(label),
            queue: self.queue.with_label_values(label),
            first_token: self.first_token.with_label_values(label),
            inter_token: self.inter_token.with_label_values(label),
            whole: self.whole.with_label_values(label),
            prefill: self.prefill.with_label_values(label),
            decode: self.decode.with_label_values(label),
            prompt_length: self.prompt_length.with_label_values(label),
            answer_length: self.answer_length.with_label_values(label),
            reasoning_tokens: self.reasoning_tokens.with_label_values(label),
            mask: self.mask.with_label_values(label),
            prompt_tokens: self.prompt_tokens.with_label_values(label),
            generation_tokens: self.generation_tokens.with_label_values(label),
            preemptions: self.preemptions.with_label_values(label),
            cache_queries: self.cache_queries.with_label_values(label),
            cache_hits: self.cache_hits.with_label_values(label),
            snapshots_saved: self.snapshots_saved.with_label_values(label),
            snapshots_evicted: self.snapshots_evicted.with_label_values(label),
            snapshots_spilled: self.snapshots_spilled.with_label_values(label),
            snapshot_bytes: self.snapshot_bytes.with_label_values(label),
            host_snapshot_bytes: self.host_snapshot_bytes.with_label_values(label),
            drafted: self.drafted.with_label_values(label),
            accepted: self.accepted.with_label_values(label),
            blocks: self.blocks.with_label_values(label),
            blocks_used: self.blocks_used.with_label_values(label),
            blocks_in_sequences: self.blocks_in_sequences.with_label_values(label),
        }
    }
}

impl ModelMetrics {
    /// A request was answered.
    pub fn success(&self, reason: &str) {
        self.count(&self.all.success, reason, 1);
    }

    /// How long an answered request was, and what its parts took.
    pub fn answered(&self, finish: &Finish) {
        let (usage, timings) = (&finish.usage, &finish.timings);
        self.prefill.observe(timings.prefill_ms / 1e3);
        self.decode.observe(timings.decode_ms / 1e3);
        self.prompt_length.observe(usage.prompt_tokens as f64);
        self.answer_length.observe(usage.completion_tokens as f64);
        let details = usage.completion_tokens_details;
        self.reasoning_tokens
            .inc_by(details.map_or(0, |details| details.reasoning_tokens));
    }

    /// A request that had been taken ended in an error.
    pub fn failed(&self, reason: &str) {
        self.count(&self.all.failed, reason, 1);
    }

    /// A request was not taken.
    pub fn rejected(&self, reason: &str) {
        self.count(&self.all.rejected, reason, 1);
    }

    /// A client left.
    pub fn cancelled(&self, phase: &str) {
        self.count(&self.all.cancelled, phase, 1);
    }

    /// A step over `decode` rows of writing sequences and `prefill` rows of prompts took `seconds`.
    pub fn step(&self, decode: usize, prefill: usize, seconds: f64) {
        let kind = match (decode, prefill) {
            (_, 0) => "decode",
            (0, _) => "prefill",
            _ => "mixed",
        };
        self.all
            .steps
            .with_label_values(&[self.model.as_str(), kind])
            .observe(seconds);
        self.count(&self.all.step_tokens, "decode", decode as u64);
        self.count(&self.all.step_tokens, "prefill", prefill as u64);
    }

    fn count(&self, family: &IntCounterVec, label: &str, by: u64) {
        family
            .with_label_values(&[self.model.as_str(), label])
            .inc_by(by);
    }
}

fn add<C: Collector + Clone + 'static>(registry: &Registry, family: prometheus::Result<C>) -> C {
    let family = family.expect("names and labels are valid constants");
    registry
        .register(Box::new(family.clone()))
        .expect("each family is registered once");
    family
}
