//! `cortex status`: the fleet as a table.

use crate::admin::{NodeStatus, Status};
use crate::cli::StatusArgs;
use crate::pingora::client::{Client, ClientError, Outgoing};
use bytes::Bytes;
use bytesize::ByteSize;
use filters::route::Endpoint;
use http::Method;
use protocol::node::{ModelStatus, RankState};
use std::fmt::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

/// Why there is nothing to show.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StatusError {
    #[error("no gateway answers: {0}")]
    Client(#[from] ClientError),
    #[error("what answers there is no cortex: {0}")]
    Foreign(#[from] serde_json::Error),
    #[error("cannot start: {0}")]
    Runtime(#[from] std::io::Error),
}

/// Asks a running gateway and prints what it says.
pub(crate) fn run(args: &StatusArgs) -> Result<(), StatusError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let body = runtime.block_on(get(args.address, "/status"))?;
    let status: Status = serde_json::from_slice(&body)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&status)?);
    } else {
        print!("{}", table(&status));
    }
    Ok(())
}

async fn get(address: SocketAddr, path: &str) -> Result<Bytes, ClientError> {
    let client = Client::new(Duration::from_secs(5), 1);
    let request = Outgoing {
        method: Method::GET,
        path,
        headers: &[],
        body: Bytes::new(),
    };
    let response = client.send(&endpoint(address), &request).await?;
    Ok(response.body().as_whole().cloned().unwrap_or_default())
}

/// A gateway as something to talk to.
pub(crate) fn endpoint(address: SocketAddr) -> Endpoint {
    Endpoint {
        node: "cortex".into(),
        address,
        authority: address.to_string().into(),
        tls: false,
        weight: 1,
        access: Arc::default(),
        load: Arc::default(),
    }
}

fn table(status: &Status) -> String {
    let mut text = format!(
        "cortex {}, {} requests in flight\n\n",
        status.version, status.in_flight
    );
    let mut rows = vec![
        [
            "NODE",
            "HEALTH",
            "ADDRESS",
            "IN FLIGHT",
            "DEVICES (FREE OF TOTAL)",
        ]
        .map(String::from),
    ];
    rows.extend(status.nodes.iter().map(|node| {
        [
            node.name.clone(),
            node.health.clone(),
            node.address.clone().unwrap_or_else(|| "?".into()),
            node.in_flight.to_string(),
            devices(node),
        ]
    }));
    align(&mut text, &rows);
    let mut rows = vec![
        [
            "MODEL",
            "STATE",
            "NODE",
            "IN FLIGHT",
            "MEMORY",
            "CONTEXT",
            "RANKS (WEIGHTS)",
        ]
        .map(String::from),
    ];
    for node in &status.nodes {
        rows.extend(node.models.iter().map(|model| {
            [
                model.id.clone(),
                model.state.as_str().into(),
                node.name.clone(),
                model.in_flight.to_string(),
                size(model.memory_bytes),
                model.context_length.to_string(),
                ranks(model),
            ]
        }));
    }
    text.push('\n');
    if rows.len() > 1 {
        align(&mut text, &rows);
    } else {
        text.push_str("no model is loaded\n");
    }
    for node in &status.nodes {
        if let Some(reason) = &node.reason {
            let _ = writeln!(text, "\n{}: {reason}", node.name); // a String takes all
        }
    }
    text
}

/// What each rank holds and where, of a model that is shared among several.
fn ranks(model: &ModelStatus) -> String {
    if model.ranks.len() < 2 {
        return String::new();
    }
    let ranks = model.ranks.iter().map(|rank| match rank.state {
        RankState::Loaded => format!("{} {}", rank.device, size(rank.weight_bytes)),
        RankState::Failed | RankState::Ended => {
            format!("{} {}", rank.device, rank.state.as_str())
        }
    });
    ranks.collect::<Vec<_>>().join(", ")
}

fn devices(node: &NodeStatus) -> String {
    let devices = node.devices.iter().map(|device| {
        format!(
            "{} {} of {}",
            device.id,
            size(device.free_bytes),
            size(device.total_bytes)
        )
    });
    devices.collect::<Vec<_>>().join(", ")
}

pub(crate) fn size(bytes: u64) -> String {
    ByteSize(bytes).display().iec().to_string()
}

/// Appends rows as columns, each as wide as its widest cell.
pub(crate) fn align<const N: usize>(text: &mut String, rows: &[[String; N]]) {
    let widths: [usize; N] = std::array::from_fn(|column| {
        rows.iter()
            .map(|row| row[column].chars().count())
            .max()
            .unwrap_or(0)
    });
    for row in rows {
        let line: String = row
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:width$}  "))
            .collect();
        text.push_str(line.trim_end());
        text.push('\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fleet_reads_as_a_table() {
        let status = serde_json::json!({
            "version": "0.1.0",
            "in_flight": 3,
            "nodes": [
                {
                    "name": "big", "address": "10.0.0.5:13131", "health": "up", "reason": null, "version": "0.1.0",
                    "in_flight": 3,
                    "devices": [{"id": "cpu", "name": "EPYC", "total_bytes": 17179869184u64, "free_bytes": 8589934592u64}],
                    "models": [
                        {"id": "demo", "state": "loaded", "memory_bytes": 1048576, "context_length": 4096, "in_flight": 3,
                         "ranks": [{"rank": 0, "state": "loaded", "device": "cpu", "weight_bytes": 1048576}]},
                        {"id": "shared", "state": "loaded", "memory_bytes": 2097152, "context_length": 4096,
                         "ranks": [{"rank": 0, "state": "loaded", "device": "cuda:0", "weight_bytes": 1048576},
                                   {"rank": 1, "state": "loaded", "device": "cuda:1", "weight_bytes": 1048576}]},
                        {"id": "broken", "state": "failed",
                         "ranks": [{"rank": 0, "state": "ended", "device": "cuda:2", "weight_bytes": 0},
                                   {"rank": 1, "state": "failed", "device": "cuda:3", "weight_bytes": 0}]},
                    ],
                },
                {
                    "name": "small", "address": null, "health": "down", "reason": "no answer within 2000 ms",
                    "version": "", "in_flight": 0, "devices": [], "models": [],
                },
            ],
        });
        let status: Status = serde_json::from_value(status).expect("a status");
        let expected = "\
cortex 0.1.0, 3 requests in flight

NODE   HEALTH  ADDRESS         IN FLIGHT  DEVICES (FREE OF TOTAL)
big    up      10.0.0.5:13131  3          cpu 8.0 GiB of 16.0 GiB
small  down    ?               0

MODEL   STATE   NODE  IN FLIGHT  MEMORY   CONTEXT  RANKS (WEIGHTS)
demo    loaded  big   3          1.0 MiB  4096
shared  loaded  big   0          2.0 MiB  4096     cuda:0 1.0 MiB, cuda:1 1.0 MiB
broken  failed  big   0          0 B      0        cuda:2 ended, cuda:3 failed

small: no answer within 2000 ms
";
        assert_eq!(table(&status), expected);
    }
}
