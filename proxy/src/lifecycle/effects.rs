//! What the lifecycle does to nodes: the only calls that load and unload.

use super::ledger::Reason;
use crate::fleet::{Fleet, FleetView};
use crate::pingora::client::{Client, ClientError, Outgoing};
use bytes::Bytes;
use filters::route::{Endpoint, Replica};
use http::Method;
use protocol::ApiError;
use protocol::node::{LoadModel, ModelState, NodeModels, UnloadModel};
use serde::Serialize;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{sleep, timeout};

/// How often a node is asked how far it is.
const LOOK: Duration = Duration::from_millis(100);
/// How often it is looked whether the node is still there.
const WATCH: Duration = Duration::from_millis(250);

/// A [`Change`](super::ledger::Change) as it is carried out.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) node: Arc<str>,
    pub(super) endpoint: Arc<Endpoint>,
    /// Models that leave; nobody new is sent to them.
    pub(super) evict: Vec<(Arc<str>, Arc<Replica>)>,
    pub(super) load: Option<LoadModel>,
    pub(super) reason: Reason,
    pub(super) deadline: Duration,
}

/// Why a change did not come about.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failed {
    #[error("{0}")]
    Unreachable(#[from] ClientError),
    #[error("{0}")]
    Refused(ApiError),
    #[error("{0}")]
    Reported(String),
    #[error("the node does not know the model it was told to load")]
    Forgotten,
    #[error("the node's answer cannot be read: {0}")]
    Foreign(#[from] serde_json::Error),
    #[error("it took longer than {} s", .0.as_secs())]
    Late(Duration),
    #[error("the node is down")]
    Down,
}

/// Carries `job` out, and leaves the fleet's view up to date.
pub(super) async fn carry_out(client: &Client, fleet: &Fleet, job: &Job) -> Result<(), Failed> {
    let change = async {
        for (model, replica) in &job.evict {
            while replica.in_flight() > 0 {
                sleep(LOOK).await; // what runs there may end
            }
            unload(client, &job.endpoint, model).await?;
        }
        match &job.load {
            Some(load) => self::load(client, &job.endpoint, load).await,
            None => Ok(()),
        }
    };
    // a node behind a broken network answers nothing and refuses nothing
    let watched = async {
        tokio::select! {
            changed = change => changed,
            () = down(fleet, &job.node) => Err(Failed::Down),
        }
    };
    let changed = timeout(job.deadline, watched)
        .await
        .unwrap_or(Err(Failed::Late(job.deadline)));
    fleet.refresh(&job.node).await;
    changed
}

/// Ends when the node counts as down, or is no member any more.
async fn down(fleet: &Fleet, node: &str) {
    let stands = |view: &FleetView| view.nodes.iter().any(|n| *n.name == *node && n.is_up());
    while stands(&fleet.view()) {
        sleep(WATCH).await;
    }
}

/// Asks for the load and waits for its end. Idempotent on the node: a load under way is joined.
async fn load(client: &Client, endpoint: &Endpoint, load: &LoadModel) -> Result<(), Failed> {
    post(client, endpoint, "/models/load", load).await?;
    loop {
        let models = models(client, endpoint).await?;
        let status = models
            .models
            .into_iter()
            .find(|model| model.id == load.id)
            .ok_or(Failed::Forgotten)?;
        match status.state {
            ModelState::Loaded => return Ok(()),
            ModelState::Failed => {
                return Err(Failed::Reported(
                    status.reason.unwrap_or_else(|| "no reason given".into()),
                ));
            }
            ModelState::Loading | ModelState::Unloading => sleep(LOOK).await,
        }
    }
}

/// Tells the node to let the model go, and waits until its memory is free.
async fn unload(client: &Client, endpoint: &Endpoint, model: &str) -> Result<(), Failed> {
    post(
        client,
        endpoint,
        "/models/unload",
        &UnloadModel { id: model.into() },
    )
    .await?;
    while models(client, endpoint).await?.models.iter().any(|status| {
        status.id == model && matches!(status.state, ModelState::Unloading | ModelState::Loaded)
    }) {
        sleep(LOOK).await;
    }
    Ok(())
}

async fn post(
    client: &Client,
    endpoint: &Endpoint,
    path: &str,
    what: &impl Serialize,
) -> Result<(), Failed> {
    let body = serde_json::to_vec(what)?.into();
    let request = Outgoing {
        method: Method::POST,
        path,
        headers: &[],
        body,
    };
    let response = client.send(endpoint, &request).await?;
    if response.status().is_success() {
        return Ok(());
    }
    let body = response.body().as_whole().cloned().unwrap_or_default();
    Err(Failed::Refused(ApiError::from_upstream(
        response.status().as_u16(),
        &body,
        None,
    )))
}

async fn models(client: &Client, endpoint: &Endpoint) -> Result<NodeModels, Failed> {
    let request = Outgoing {
        method: Method::GET,
        path: "/models",
        headers: &[],
        body: Bytes::new(),
    };
    let response = client.send(endpoint, &request).await?;
    Ok(serde_json::from_slice(
        response.body().as_whole().map_or(&[][..], |body| body),
    )?)
}
