//! Chat chunks → message events.

use super::reply::{message_id, stop};
use super::wire::OutputUsage;
use crate::translate::Translator;
use protocol::chat::{ChatChunk, Delta, FinishReason, ToolCallDelta};
use protocol::sse::write_event;
use serde_json::{Value, json};

/// State of one streamed message.
#[derive(Debug, Default)]
pub(super) struct Events {
    started: bool,
    /// The open block and its index.
    open: Option<(Block, u32)>,
    /// How many blocks have been opened.
    blocks: u32,
    finish: Option<FinishReason>,
    stop_sequence: Option<String>,
    usage: OutputUsage,
}

/// What kind of block is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Block {
    Thinking,
    Text,
    /// The tool call with this index in the chat stream.
    Call(u32),
}

impl Translator for Events {
    fn chunk(&mut self, chunk: &ChatChunk, out: &mut Vec<u8>) {
        if let Some(usage) = chunk.usage {
            self.usage = usage.into();
        }
        self.start(&chunk.id, &chunk.model, out);
        let Some(choice) = chunk.choices.first() else {
            return;
        };
        self.delta(&choice.delta, out);
        if let Some(finish) = choice.finish_reason {
            self.finish = Some(finish);
            self.stop_sequence.clone_from(&choice.stop_reason);
        }
    }

    fn finish(&mut self, out: &mut Vec<u8>) {
        self.start("", "", out);
        self.close(out);
        let (stop_reason, stop_sequence) = stop(self.finish, self.stop_sequence.take());
        let delta = json!({
            "type": "message_delta",
            "delta": {"stop_reason": stop_reason, "stop_sequence": stop_sequence},
            "usage": self.usage,
        });
        write_event(out, "message_delta", &delta);
        write_event(out, "message_stop", &json!({"type": "message_stop"}));
    }

    fn keep_alive(&mut self, out: &mut Vec<u8>) {
        write_event(out, "ping", &json!({"type": "ping"}));
    }
}

impl Events {
    fn start(&mut self, id: &str, model: &str, out: &mut Vec<u8>) {
        if std::mem::replace(&mut self.started, true) {
            return;
        }
        let start = json!({
            "type": "message_start",
            "message": {
                "id": message_id(id),
                "type": "message",
                "role": "assistant",
                "model": model,
                "content": [],
                "stop_reason": null,
                "stop_sequence": null,
                "usage": self.usage,
            },
        });
        write_event(out, "message_start", &start);
    }

    fn delta(&mut self, delta: &Delta, out: &mut Vec<u8>) {
        if let Some(text) = delta
            .reasoning_content
            .as_deref()
            .filter(|text| !text.is_empty())
        {
            let at = self.open(
                Block::Thinking,
                || json!({"type": "thinking", "thinking": "", "signature": ""}),
                out,
            );
            block_delta(
                at,
                &json!({"type": "thinking_delta", "thinking": text}),
                out,
            );
        }
        if let Some(text) = delta.content.as_deref().filter(|text| !text.is_empty()) {
            let at = self.open(Block::Text, || json!({"type": "text", "text": ""}), out);
            block_delta(at, &json!({"type": "text_delta", "text": text}), out);
        }
        for call in delta.tool_calls.iter().flatten() {
            self.call(call, out);
        }
    }

    fn call(&mut self, call: &ToolCallDelta, out: &mut Vec<u8>) {
        let block = || {
            json!({
                "type": "tool_use",
                "id": call.id.as_deref().unwrap_or_default(),
                "name": call.function.name.as_deref().unwrap_or_default(),
                "input": {},
            })
        };
        let at = self.open(Block::Call(call.index), block, out);
        if let Some(json) = call
            .function
            .arguments
            .as_deref()
            .filter(|json| !json.is_empty())
        {
            block_delta(
                at,
                &json!({"type": "input_json_delta", "partial_json": json}),
                out,
            );
        }
    }

    /// The index of the open block of this kind, opened now if another kind was open.
    fn open(&mut self, block: Block, start: impl FnOnce() -> Value, out: &mut Vec<u8>) -> u32 {
        if let Some((open, index)) = self.open
            && open == block
        {
            return index;
        }
        self.close(out);
        let index = self.blocks;
        self.blocks += 1;
        self.open = Some((block, index));
        let event =
            json!({"type": "content_block_start", "index": index, "content_block": start()});
        write_event(out, "content_block_start", &event);
        index
    }

    fn close(&mut self, out: &mut Vec<u8>) {
        let Some((block, index)) = self.open.take() else {
            return;
        };
        if block == Block::Thinking {
            // this API's clients expect a signature before a thinking block ends; we have nothing to sign
            block_delta(
                index,
                &json!({"type": "signature_delta", "signature": ""}),
                out,
            );
        }
        write_event(
            out,
            "content_block_stop",
            &json!({"type": "content_block_stop", "index": index}),
        );
    }
}

fn block_delta(index: u32, delta: &Value, out: &mut Vec<u8>) {
    let event = json!({"type": "content_block_delta", "index": index, "delta": delta});
    write_event(out, "content_block_delta", &event);
}
