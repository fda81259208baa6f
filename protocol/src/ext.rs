//! Every extension to the canonical dialect, in one list.

/// Request header by which cortex asks a neuron to end each stream with the comment [`USAGE_COMMENT`].
///
/// The client's own bytes stay untouched, and a server that does not know the header ignores it.
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
