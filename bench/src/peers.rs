//! `bench peers`: servers of the same model beside each other: tokens a second of some streams at once, and the first token of a
//! conversation's second turn.

use crate::connection::{Ask, Connection, Failure};
use anyhow::Context as _;
use clap::Args;
use serde::Deserialize;
use serde_json::json;
use std::net::SocketAddr;
use std::time::Instant;
use tokio::task::JoinSet;

/// Which servers, and what is asked of them.
#[derive(Debug, Args)]
pub(crate) struct PeersArgs {
    /// A server, as `NAME=http://HOST:PORT`; the first is compared with the others.
    #[arg(long = "server", value_name = "NAME=URL", required = true)]
    servers: Vec<String>,
    /// The model to ask for.
    #[arg(long, value_name = "ID")]
    model: String,
    /// How many streams at once.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 4, 8, 16])]
    streams: Vec<usize>,
    /// Tokens that each stream writes.
    #[arg(long, default_value_t = 64)]
    tokens: usize,
    /// Bytes of the conversation whose second turn is timed; each is about a token of a model without merges.
    #[arg(long, default_value_t = 2000)]
    conversation: usize,
    /// Times everything is measured; medians are printed.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
}

struct Server {
    name: String,
    address: SocketAddr,
}

/// Measures and prints a table.
///
/// # Errors
/// When a server cannot be reached or an answer is not as asked for.
pub(crate) async fn run(args: PeersArgs) -> anyhow::Result<()> {
    let mut servers = Vec::new();
    for server in &args.servers {
        let (name, url) = server
            .split_once('=')
            .with_context(|| format!("--server {server}: NAME=URL is needed"))?;
        servers.push(Server {
            name: name.to_owned(),
            address: crate::load::resolve(url).await?,
        });
    }
    let names: Vec<&str> = servers.iter().map(|server| &*server.name).collect();
    println!("| | {} | first ÷ others |", names.join(" | "));
    println!("|---|{}--:|", "--:|".repeat(servers.len()));
    for &streams in &args.streams {
        let mut rates = vec![Vec::new(); servers.len()];
        for round in 0..args.rounds {
            for (server, rates) in servers.iter().zip(&mut rates) {
                rates.push(rate(server, &args, streams, round).await?);
            }
        }
        row(&format!("{streams} streams, tokens/s"), rates);
    }
    let (mut first, mut second) = (
        vec![Vec::new(); servers.len()],
        vec![Vec::new(); servers.len()],
    );
    for round in 0..args.rounds {
        for (at, server) in servers.iter().enumerate() {
            let [one, two] = turns(server, &args, round).await?;
            first[at].push(one);
            second[at].push(two);
        }
    }
    row("first turn, ms to the first token", first);
    row("second turn, ms to the first token", second);
    Ok(())
}

fn row(what: &str, figures: Vec<Vec<f64>>) {
    let medians: Vec<f64> = figures.into_iter().map(median).collect();
    let cells: Vec<String> = medians
        .iter()
        .map(|figure| format!("{figure:.1}"))
        .collect();
    let ratios: Vec<String> = medians[1..]
        .iter()
        .map(|other| format!("{:.2}", medians[0] / other))
        .collect();
    println!("| {what} | {} | {} |", cells.join(" | "), ratios.join(", "));
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

#[derive(Deserialize)]
struct Answer {
    usage: Usage,
}

#[derive(Deserialize)]
struct Usage {
    completion_tokens: usize,
}

/// Tokens a second of `streams` that begin together, with prompts that have nothing in common.
async fn rate(
    server: &Server,
    args: &PeersArgs,
    streams: usize,
    round: usize,
) -> anyhow::Result<f64> {
    let mut tasks = JoinSet::new();
    let mut connections = Vec::new();
    for _ in 0..streams {
        connections.push(Connection::open(server.address).await?);
    }
    let began = Instant::now();
    for (stream, mut connection) in connections.into_iter().enumerate() {
        let body = json!({
            "model": args.model,
            "prompt": format!("{round}.{streams}.{stream} writes:"),
            "max_tokens": args.tokens,
            "ignore_eos": true,
            "temperature": 0,
        });
        let ask = Ask::post(server.address, "/v1/completions", &body, b"}");
        tasks.spawn(async move {
            let mut answer = Vec::new();
            connection
                .exchange(&ask, |piece| answer.extend_from_slice(piece))
                .await?;
            Ok::<_, Failure>(answer)
        });
    }
    let mut tokens = 0;
    while let Some(ended) = tasks.join_next().await {
        let answer = ended.expect("a client does not panic")?;
        let answer: Answer = serde_json::from_slice(&answer).context("an answer with its usage")?;
        tokens += answer.usage.completion_tokens;
    }
    anyhow::ensure!(
        tokens == streams * args.tokens,
        "{} wrote {tokens} tokens of {}",
        server.name,
        streams * args.tokens
    );
    Ok(tokens as f64 / began.elapsed().as_secs_f64())
}

/// Milliseconds to the first token of a conversation's first turn and of its second: all of an answer of one token, as a token
/// of a random model may have no text to stream.
async fn turns(server: &Server, args: &PeersArgs, round: usize) -> anyhow::Result<[f64; 2]> {
    let user = |text: String| json!({"role": "user", "content": text});
    let long = (0..args.conversation / 8).map(|at| format!(" {:06x}", at * 7919 + round));
    let mut messages = vec![user(format!("{round}{}", long.collect::<String>()))];
    let mut times = [0.0; 2];
    for time in &mut times {
        let body = json!({
            "model": args.model,
            "messages": &messages,
            "max_tokens": 1,
            "temperature": 0,
        });
        let ask = Ask::post(server.address, "/v1/chat/completions", &body, b"}");
        let mut connection = Connection::open(server.address).await?;
        let times = connection.exchange(&ask, |_| {}).await?;
        *time = times.whole.as_secs_f64() * 1e3;
        messages.push(json!({"role": "assistant", "content": "Yes."}));
        messages.push(user("And then?".to_owned()));
    }
    Ok(times)
}
