//! What `prefix_affinity` is for: conversations that find their beginning in a node's cache, with real neurons.

#![allow(missing_docs, clippy::unwrap_used)]

use futures::{StreamExt, stream};
use serde_json::{Value, json};
use tests::daemon::{Cortex, Daemon, demo};

/// Conversations that are under way at the same time.
const AT_ONCE: usize = 8;

/// What somebody says in this conversation: every one has words of its own from the first on.
fn said(conversation: usize, turn: usize) -> Value {
    let text = format!("Traveller {conversation} asks on day {turn} about the weather in Paris. ");
    json!({"role": "user", "content": text.repeat(4)})
}

/// Conversations over four neurons, all of them turn by turn, and each goes on from what it was answered; the share of
/// prompt tokens that came from a cache.
async fn cached_share(policy: &str, conversations: usize, turns: usize) -> f64 {
    let mut daemons: Vec<Daemon> = Vec::new();
    let mut at = Vec::new();
    for name in ["a", "b", "c", "d"] {
        let (daemon, address) = demo().await;
        daemons.push(daemon);
        at.push((name, address));
    }
    let cortex = Cortex::start(&at, "", &format!("routing = \"{policy}\"")).await;
    let mut histories: Vec<Vec<Value>> = vec![Vec::new(); conversations];
    for turn in 0..turns {
        let cortex = &cortex;
        let asked = histories
            .into_iter()
            .enumerate()
            .map(|(index, mut history)| async move {
                history.push(said(index, turn));
                let body = json!({"model": "demo", "max_tokens": 24, "messages": history});
                let (status, mut answer) = cortex.ask("/v1/chat/completions", &body).await;
                assert!(status.is_success(), "{answer}");
                history.push(answer["choices"][0]["message"].take());
                history
            });
        histories = stream::iter(asked).buffered(AT_ONCE).collect().await;
    }
    let (mut cached, mut all) = (0.0, 0.0);
    for (node, _) in &at {
        let count = async |name| {
            let name = format!("{name}{{model=\"demo\",node=\"{node}\"}}");
            cortex.metric(&name).await.unwrap_or(0.0)
        };
        cached += count("cortex_cached_prompt_tokens_total").await;
        all += count("cortex_prompt_tokens_total").await;
    }
    let share = cached / all;
    println!(
        "{policy}: {cached} of {all} prompt tokens from a cache, {:.1} %",
        share * 100.0
    );
    share
}

async fn compare(conversations: usize, turns: usize, least: f64) {
    let with = cached_share("prefix_affinity", conversations, turns).await;
    let without = cached_share("least_loaded", conversations, turns).await;
    println!("{:.2} times as much", with / without);
    assert!(with >= least * without, "{with} against {without}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conversations_find_more_of_themselves_with_affinity_than_without() {
    compare(40, 4, 1.5).await; // `least_loaded` finds what chance gives it: 40 are few
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a minute or more; `.ci/run --long` runs it"]
async fn two_hundred_conversations_find_twice_as_much_of_themselves() {
    compare(200, 5, 2.0).await;
}
