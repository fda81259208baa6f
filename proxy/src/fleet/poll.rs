//! Asks all nodes at once how they are, and publishes what they said.

use super::{Fleet, Node};
use crate::pingora::client::{Client, ClientError, Outgoing};
use bytes::Bytes;
use filters::route::Endpoint;
use futures::future::join_all;
use http::Method;
use rand::Rng;
use serde::de::DeserializeOwned;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{sleep, timeout};

/// Why a node could not be asked.
#[derive(Debug, thiserror::Error)]
enum PollError {
    #[error("its name cannot be resolved: {0}")]
    Name(std::io::Error),
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("GET {path} answered {status}")]
    Status { path: &'static str, status: u16 },
    #[error("GET {path} answered something else than it should: {source}")]
    Foreign {
        path: &'static str,
        source: serde_json::Error,
    },
    #[error("no answer within {} ms", .0.as_millis())]
    Late(Duration),
}

impl Fleet {
    /// Polls for ever.
    pub(crate) async fn run(&self) {
        loop {
            self.look().await;
            let poll = self.lock().poll;
            // gateways that were started together do not ask together for ever
            let share = rand::rng().random_range(1.0 - poll.jitter..=1.0 + poll.jitter);
            sleep(poll.period.mul_f64(share)).await;
        }
    }

    /// Asks all nodes once.
    pub(crate) async fn look(&self) {
        let nodes = self.lock().nodes.clone();
        join_all(nodes.iter().map(|node| self.ask(node))).await;
        self.publish();
    }

    /// Asks one node now, out of turn: its models have just changed.
    pub(crate) async fn refresh(&self, name: &str) {
        let node = self
            .lock()
            .nodes
            .iter()
            .find(|node| *node.neuron.name == *name)
            .cloned();
        if let Some(node) = node {
            self.ask(&node).await;
            self.publish();
        }
    }

    async fn ask(&self, node: &Arc<Node>) {
        let poll = self.lock().poll;
        let asked = timeout(poll.timeout, inquire(&self.client, node)).await;
        match asked.unwrap_or(Err(PollError::Late(poll.timeout))) {
            Ok((info, models)) => node.answered(info, models, poll.up_after),
            Err(error) => node.failed(&error.to_string(), poll.down_after),
        }
    }
}

async fn inquire(
    client: &Client,
    node: &Node,
) -> Result<(protocol::node::NodeInfo, protocol::node::NodeModels), PollError> {
    let mut addresses = tokio::net::lookup_host(&*node.neuron.authority)
        .await
        .map_err(PollError::Name)?;
    let address = addresses.next().ok_or_else(|| {
        PollError::Name(std::io::Error::new(
            std::io::ErrorKind::NotFound,
            "no address",
        ))
    })?;
    let endpoint = node.at(address);
    let info = get(client, &endpoint, "/discovery").await?;
    let models = get(client, &endpoint, "/models").await?;
    Ok((info, models))
}

async fn get<T: DeserializeOwned>(
    client: &Client,
    endpoint: &Endpoint,
    path: &'static str,
) -> Result<T, PollError> {
    let request = Outgoing {
        method: Method::GET,
        path,
        headers: &[],
        body: Bytes::new(),
    };
    let response = client.send(endpoint, &request).await?;
    if !response.status().is_success() {
        return Err(PollError::Status {
            path,
            status: response.status().as_u16(),
        });
    }
    let body = response.body().as_whole().cloned().unwrap_or_default();
    serde_json::from_slice(&body).map_err(|source| PollError::Foreign { path, source })
}
