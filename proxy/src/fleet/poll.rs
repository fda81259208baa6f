//! Asks all nodes at once how they are, and publishes what they said.

use super::{Fleet, Node};
use crate::config::Kind;
use crate::pingora::client::{Client, ClientError, Outgoing};
use bytes::Bytes;
use filters::route::Endpoint;
use futures::future::join_all;
use http::Method;
use protocol::node::{ModelState, ModelStatus, NodeInfo, NodeModels};
use rand::Rng;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::net::SocketAddr;
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
    async fn look(&self) {
        self.look_with(&self.client).await;
    }

    /// Asks all nodes once, from a runtime that ends after that: its connections are not kept.
    pub(crate) async fn look_before(&self) {
        let bound = self.lock().poll.timeout;
        self.look_with(&Client::new(bound, 1)).await;
    }

    async fn look_with(&self, client: &Client) {
        self.resolve().await;
        let nodes = self.lock().nodes.clone();
        join_all(nodes.iter().map(|node| self.ask(client, node))).await;
        self.publish();
    }

    /// Asks the name service about nodes of which every address is one, and lets those go whose time is over.
    async fn resolve(&self) {
        let (names, bound) = {
            let members = self.lock();
            let several = members.configured.iter().filter(|n| n.all_addresses);
            let names: Vec<_> = several
                .map(|neuron| (neuron.name.clone(), neuron.authority.clone()))
                .collect();
            (names, members.poll.timeout)
        };
        let answers = join_all(names.into_iter().map(|(name, authority)| async move {
            let found = timeout(bound, tokio::net::lookup_host(&*authority)).await;
            let mut addresses: Vec<SocketAddr> = found.ok()?.ok()?.collect();
            addresses.sort_unstable();
            addresses.dedup();
            Some((name, addresses))
        }));
        let answers = answers.await;
        let mut members = self.lock();
        for (name, mut addresses) in answers.into_iter().flatten() {
            // name services may tell a part at a time: a node that answers is one, whatever is said of it
            let alive = members.nodes.iter().filter(|node| {
                let own = node.neuron.name.strip_prefix(&*name);
                own.is_some_and(|rest| rest.starts_with('/')) && node.view().is_up()
            });
            addresses.extend(alive.filter_map(|node| node.address));
            addresses.sort_unstable();
            addresses.dedup();
            members.addresses.insert(name, addresses);
        }
        members.refill();
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
            self.ask(&self.client, &node).await;
            self.publish();
        }
    }

    async fn ask(&self, client: &Client, node: &Arc<Node>) {
        let poll = self.lock().poll;
        let asked = timeout(poll.timeout, inquire(client, node)).await;
        match asked.unwrap_or(Err(PollError::Late(poll.timeout))) {
            Ok((info, models)) => node.answered(info, models, poll.up_after),
            Err(error) => node.failed(&error.to_string(), poll.down_after),
        }
    }
}

async fn inquire(client: &Client, node: &Node) -> Result<(NodeInfo, NodeModels), PollError> {
    let address = match node.address {
        Some(address) => address,
        None => {
            let found = tokio::net::lookup_host(&*node.neuron.authority).await;
            let first = found.map_err(PollError::Name)?.next();
            let none = || std::io::Error::new(std::io::ErrorKind::NotFound, "no address");
            first.ok_or_else(|| PollError::Name(none()))?
        }
    };
    let endpoint = node.at(address);
    if let Kind::OpenAi { models } = &node.neuron.kind {
        return foreign(client, &endpoint, models).await;
    }
    let info = get(client, &endpoint, "/discovery").await?;
    let models = get(client, &endpoint, "/models").await?;
    Ok((info, models))
}

/// What a foreign server has, put as a node of ours would. That it answers is all that is known of its health.
async fn foreign(
    client: &Client,
    endpoint: &Endpoint,
    models: &[Arc<str>],
) -> Result<(NodeInfo, NodeModels), PollError> {
    let list: ForeignList = get(client, endpoint, "/v1/models").await?;
    let ids: Vec<String> = if models.is_empty() {
        list.data.into_iter().map(|card| card.id).collect()
    } else {
        models.iter().map(ToString::to_string).collect()
    };
    let loaded = |id| ModelStatus {
        id,
        state: ModelState::Loaded,
        progress: 1.0,
        reason: None,
        source: String::new(),
        devices: Vec::new(),
        ranks: Vec::new(),
        memory_bytes: 0,
        context_length: 0,
        capabilities: Vec::new(),
        in_flight: 0,
        since: 0,
    };
    let info = NodeInfo {
        host: endpoint.authority.to_string(),
        version: "openai".into(),
        devices: Vec::new(),
        features: Vec::new(),
        cuda: None,
    };
    let models = ids.into_iter().map(loaded).collect();
    Ok((info, NodeModels { models }))
}

/// `GET /v1/models` of any server, as far as it is needed.
#[derive(Deserialize)]
struct ForeignList {
    data: Vec<ForeignCard>,
}

#[derive(Deserialize)]
struct ForeignCard {
    id: String,
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
