//! What to do about a wanted model: a pure decision, without socket, clock or lock.

use super::placement::{self, Circumstances, Placement};
use protocol::node::ModelState;
use protocol::{ApiError, ErrorKind};
use std::sync::Arc;
use std::time::Duration;

/// What to do next about one wanted model.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    /// It is there: answer whoever waits.
    Serve,
    /// Load it on this node, after these have left.
    Load {
        node: Arc<str>,
        evict: Vec<Arc<str>>,
    },
    /// Look again when something has changed.
    Wait,
    /// Tell whoever waits that it will not come.
    Refuse(Refusal),
}

/// Why a model will not come.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("the model `{0}` is not in the catalogue, and no node serves it any more")]
    Unknown(Arc<str>),
    #[error("the model needs {} on one device, the largest in the fleet has {}", size(*.need), size(*.largest))]
    TooLarge { need: u64, largest: u64 },
    #[error("no node is up that could load the model")]
    NoNode,
    #[error("the model could not be loaded: {0}")]
    LoadFailed(String),
}

fn size(bytes: u64) -> String {
    bytesize::ByteSize(bytes).display().iec().to_string()
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        let message = refusal.to_string();
        match refusal {
            Refusal::Unknown(model) => Self::model_not_found(&model),
            Refusal::TooLarge { .. } => Self::new(ErrorKind::Unavailable, message),
            Refusal::NoNode => {
                Self::new(ErrorKind::Unavailable, message).retry_after(Duration::from_secs(2))
            }
            Refusal::LoadFailed(_) => {
                Self::new(ErrorKind::Unavailable, message).retry_after(super::BACKOFF)
            }
        }
    }
}

/// Decides about `model`. `under_way`: this gateway is having it loaded now. `last_failure`: why it failed lately, on the nodes that `failed_on` names.
pub(crate) fn decide(
    model: &Arc<str>,
    circumstances: &Circumstances<'_>,
    under_way: bool,
    last_failure: Option<&str>,
) -> Decision {
    if circumstances.view.served(model).is_some() {
        return Decision::Serve;
    }
    if under_way {
        return Decision::Wait;
    }
    let Some(entry) = circumstances.config.models.get(model) else {
        return Decision::Refuse(Refusal::Unknown(model.clone()));
    };
    let nodes = &circumstances.view.nodes;
    let loading = nodes.iter().find(|node| {
        node.is_up()
            && node
                .model(model)
                .is_some_and(|model| model.state == ModelState::Loading)
    });
    if let Some(node) = loading {
        // another gateway asked for it, or a person did: join that load instead of starting a second
        return match (circumstances.occupied)(&node.name) {
            true => Decision::Wait,
            false => Decision::Load {
                node: node.name.clone(),
                evict: Vec::new(),
            },
        };
    }
    match placement::place(entry, circumstances) {
        Placement::On { node, evict } => Decision::Load { node, evict },
        Placement::Busy => Decision::Wait,
        Placement::TooLarge { need, largest } => {
            Decision::Refuse(Refusal::TooLarge { need, largest })
        }
        Placement::NoNode => Decision::Refuse(match last_failure {
            Some(reason) => Refusal::LoadFailed(reason.into()),
            None => Refusal::NoNode,
        }),
    }
}
