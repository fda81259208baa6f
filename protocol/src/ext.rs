//! Every extension to the canonical dialect, in one list.

/// The id under which a request is logged on every hop; taken from the client if it is sane.
pub const REQUEST_ID_HEADER: &str = "x-request-id";

/// The node that served a request, named on the reply by cortex.
pub const NODE_HEADER: &str = "x-cortex-node";

/// Reply header of a neuron: how many top-level request fields it did not know (and did not use).
pub const UNKNOWN_FIELDS_HEADER: &str = "x-unknown-fields";

/// Reply header of a neuron on a stream, whose usage comes last: how many tokens the prompts have.
pub const PROMPT_TOKENS_HEADER: &str = "x-prompt-tokens";

/// Reply header of cortex on a count of tokens that no node made: it is an estimate.
pub const ESTIMATED_HEADER: &str = "x-cortex-estimated";
