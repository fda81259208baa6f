//! Whole chat reply → response.

use super::events::Events;
use super::wire::Response;
use crate::translate::Translator;
use protocol::chat::{ChatChunk, ChatReply, ChunkChoice, Delta, FunctionCallDelta, ToolCallDelta};
use protocol::{ApiError, ErrorKind};

/// The response that says what `chat` says: that of a stream of one piece, so that both ways agree.
pub(super) fn from_chat(chat: ChatReply, mut events: Events) -> Result<Response, ApiError> {
    let choice = chat.choices.into_iter().next().ok_or_else(|| {
        ApiError::new(
            ErrorKind::BadGateway,
            "the upstream's reply holds no answer",
        )
    })?;
    let calls = choice.message.tool_calls.map(|calls| {
        let piece = |(index, call): (u32, protocol::chat::ToolCall)| ToolCallDelta {
            index,
            id: Some(call.id),
            kind: Some(call.kind),
            function: FunctionCallDelta {
                name: Some(call.function.name),
                arguments: Some(call.function.arguments),
            },
        };
        (0..).zip(calls).map(piece).collect()
    });
    let chunk = ChatChunk {
        id: chat.id,
        object: chat.object,
        created: chat.created,
        model: chat.model,
        choices: vec![ChunkChoice {
            index: 0,
            delta: Delta {
                role: None,
                content: choice.message.content,
                reasoning_content: choice.message.reasoning_content,
                tool_calls: calls,
            },
            logprobs: choice.logprobs,
            finish_reason: choice.finish_reason,
            stop_reason: choice.stop_reason,
        }],
        usage: chat.usage,
        timings: chat.timings,
    };
    let mut unseen = Vec::new();
    events.chunk(&chunk, &mut unseen);
    events.finish(&mut unseen);
    Ok(events.into_response())
}
