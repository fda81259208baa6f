//! Chat chunks → message events.

use super::reply::{message_id, stop};
use super::wire::{BlockDelta, OutputUsage, StreamEvent};
use crate::translate::Translator;
use protocol::chat::{ChatChunk, Delta, FinishReason, ToolCallDelta};
use protocol::sse::write_event;
use serde::de::IgnoredAny;
use serde_json::{Value, json};

/// State of one streamed message. Its blocks follow one another: each ends before the next begins.
#[derive(Debug, Default)]
pub(super) struct Events {
    started: bool,
    /// The open block and its index.
    open: Option<(Block, u32)>,
    /// How many blocks have been opened.
    blocks: u32,
    /// Every tool call so far. Those before `begun` have had their block opened.
    calls: Vec<Call>,
    begun: usize,
    /// The ids that calls were shown under.
    shown: Vec<String>,
    finish: Option<FinishReason>,
    stop_sequence: Option<String>,
    usage: OutputUsage,
}

/// What kind of block is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Block {
    Thinking,
    Text,
    Call,
}

/// A tool call, as far as it has come.
#[derive(Debug, Default)]
struct Call {
    /// Its index in the chat stream.
    index: u32,
    id: Option<String>,
    name: Option<String>,
    arguments: String,
    /// How many bytes of the arguments have been written.
    written: usize,
}

impl Translator for Events {
    fn prompt(&mut self, tokens: u64) {
        self.usage.input_tokens = tokens; // which of them were cached is known in the end
    }

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
        self.end_calls(out);
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
        let written = |text: &&str| !text.is_empty();
        if let Some(thinking) = delta.reasoning_content.as_deref().filter(written) {
            self.end_calls(out);
            let start = || json!({"type": "thinking", "thinking": "", "signature": ""});
            let index = self.open(Block::Thinking, start, out);
            block_delta(index, BlockDelta::ThinkingDelta { thinking }, out);
        }
        if let Some(text) = delta.content.as_deref().filter(written) {
            self.end_calls(out);
            let start = || json!({"type": "text", "text": ""});
            let index = self.open(Block::Text, start, out);
            block_delta(index, BlockDelta::TextDelta { text }, out);
        }
        for call in delta.tool_calls.iter().flatten() {
            self.call(call, out);
        }
    }

    /// Adds a piece to its call. Calls are written one after the other, each from its name on, as its pieces come.
    fn call(&mut self, piece: &ToolCallDelta, out: &mut Vec<u8>) {
        // some servers repeat id and name in each piece, empty or not, and some give every call the index 0
        let id = piece.id.as_deref().filter(|id| !id.is_empty());
        let name = piece.function.name.as_deref();
        let known = self.calls.iter().rposition(|call| {
            let other = id.zip(call.id.as_deref()).is_some_and(|(a, b)| a != b);
            call.index == piece.index && !other
        });
        let at = known.unwrap_or_else(|| {
            self.calls.push(Call {
                index: piece.index,
                ..Call::default()
            });
            self.calls.len() - 1
        });
        let call = &mut self.calls[at];
        if call.id.is_none() {
            call.id = id.map(Into::into);
        }
        if call.name.is_none() {
            call.name = name.filter(|name| !name.is_empty()).map(Into::into);
        }
        call.arguments += piece.function.arguments.as_deref().unwrap_or_default();
        self.write_calls(out);
    }

    /// Writes what has come of the open call; the next one begins when that is complete.
    fn write_calls(&mut self, out: &mut Vec<u8>) {
        loop {
            if let Some((Block::Call, index)) = self.open {
                let last = self.begun == self.calls.len();
                let call = &mut self.calls[self.begun - 1];
                let partial_json = &call.arguments[call.written..];
                if !partial_json.is_empty() {
                    block_delta(index, BlockDelta::InputJsonDelta { partial_json }, out);
                    call.written = call.arguments.len();
                }
                if last || !call.is_complete() {
                    return;
                }
            }
            if self
                .calls
                .get(self.begun)
                .is_none_or(|call| call.name.is_none())
            {
                return;
            }
            self.begin_call(out);
        }
    }

    /// No more pieces are waited for: every call is written as far as it has come.
    fn end_calls(&mut self, out: &mut Vec<u8>) {
        while self.begun < self.calls.len() {
            self.begin_call(out);
            self.write_calls(out);
        }
    }

    fn begin_call(&mut self, out: &mut Vec<u8>) {
        self.close(out);
        let call = &self.calls[self.begun];
        self.begun += 1;
        let mut id = match &call.id {
            Some(id) => id.clone(),
            None => format!("call_{}", call.index),
        };
        // an id that is there already would join this call to another's result
        while self.shown.contains(&id) {
            id = format!("{id}_{}", self.begun);
        }
        let block = json!({
            "type": "tool_use",
            "id": id,
            "name": call.name.as_deref().unwrap_or_default(),
            "input": {},
        });
        self.shown.push(id);
        self.open(Block::Call, || block, out);
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
            block_delta(index, BlockDelta::SignatureDelta { signature: "" }, out);
        }
        write_event(
            out,
            "content_block_stop",
            &StreamEvent::ContentBlockStop { index },
        );
    }
}

impl Call {
    fn is_complete(&self) -> bool {
        serde_json::from_str::<IgnoredAny>(&self.arguments).is_ok()
    }
}

fn block_delta(index: u32, delta: BlockDelta<'_>, out: &mut Vec<u8>) {
    write_event(
        out,
        "content_block_delta",
        &StreamEvent::ContentBlockDelta { index, delta },
    );
}
