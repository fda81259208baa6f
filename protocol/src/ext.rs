//! Every extension to the canonical dialect, in one list.

/// Request header by which a caller asks a neuron to end each stream with the comment [`USAGE_COMMENT`].
///
/// For those who count streams without a word in their bodies; cortex itself asks by `stream_options.include_usage`.
pub const USAGE_COMMENT_HEADER: &str = "x-cortex-usage-comment";

/// Start of the SSE comment line that carries the usage of a finished stream as JSON:
/// `: usage {"prompt_tokens":…}`. Clients ignore comments, so it may pass on to them.
pub const USAGE_COMMENT: &str = ": usage ";

/// The id under which a request is logged on every hop; taken from the client if it is sane.
pub const REQUEST_ID_HEADER: &str = "x-request-id";

/// The node that served a request, named on the reply by cortex.
pub const NODE_HEADER: &str = "x-cortex-node";

/// Reply header of a neuron: how many top-level request fields it did not know (and did not use).
pub const UNKNOWN_FIELDS_HEADER: &str = "x-unknown-fields";

/// Reply header of cortex on a count of tokens that no node made: it is an estimate.
pub const ESTIMATED_HEADER: &str = "x-cortex-estimated";
