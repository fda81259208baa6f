//! Nodes that join by themselves: they say who they are, prove that they may, and say so again and again.

use super::Fleet;
use crate::config::{Joining, Kind, Neuron, endpoint};
use protocol::node::{Join, Joined};
use protocol::{ApiError, ErrorKind};
use std::net::IpAddr;
use std::sync::Arc;
use tokio::time::Instant;

impl Fleet {
    /// Takes `join`, which came from `from` with the credential `given`, for as long as its lease.
    ///
    /// # Errors
    /// Why it may not be a node.
    pub(crate) fn join(
        &self,
        joining: Option<&Joining>,
        given: Option<&str>,
        from: Option<IpAddr>,
        join: &Join,
    ) -> Result<Joined, ApiError> {
        let Some(Joining { token, lease }) = joining else {
            let message = "nodes may not join this gateway: it has no fleet.join_token_file";
            return Err(ApiError::new(ErrorKind::Forbidden, message));
        };
        let known = given.and_then(|given| given.strip_prefix("Bearer "));
        if !known.is_some_and(|given| same(given.as_bytes(), token.0.as_bytes())) {
            let message = "this is not the token of this gateway";
            return Err(ApiError::new(ErrorKind::Unauthorized, message));
        }
        if join.name.is_empty() || !join.name.bytes().all(|b| b.is_ascii_graphic()) {
            let message = "`name` must be letters, digits and dashes";
            return Err(ApiError::invalid("name", message));
        }
        let url = match (&join.endpoint, from) {
            (Some(url), _) => url.clone(),
            (None, Some(IpAddr::V6(host))) => format!("http://[{host}]:{}", join.port),
            (None, Some(host)) => format!("http://{host}:{}", join.port),
            (None, None) => String::new(),
        };
        let Some((authority, tls, _)) = endpoint(&url, false) else {
            let message =
                format!("`{url}` is no address of a node; write it like http://10.0.0.5:13131");
            return Err(ApiError::invalid("endpoint", message));
        };
        let neuron = Neuron {
            name: join.name.as_str().into(),
            authority: authority.into(),
            tls,
            weight: 1,
            all_addresses: false,
            kind: Kind::Neuron,
            access: Arc::default(),
        };
        let mut members = self.lock();
        if members.configured.iter().any(|own| own.name == neuron.name) {
            let message = format!("there is a node `{}` in the configuration", join.name);
            return Err(ApiError::new(ErrorKind::Conflict, message));
        }
        let now = Instant::now();
        let before = members.joined.get(&neuron.name);
        if before.is_some_and(|(other, until)| *other != neuron && *until > now) {
            let message = format!(
                "another node is called `{}`; call this one differently",
                join.name
            );
            return Err(ApiError::new(ErrorKind::Conflict, message));
        }
        let name = neuron.name.clone();
        if before.is_none() {
            tracing::info!(node = &*name, at = &*neuron.authority, "node joined");
        }
        members.joined.insert(name, (neuron, now + *lease));
        members.refill();
        drop(members);
        self.publish();
        Ok(Joined {
            again_in_seconds: (lease.as_secs() / 3).max(1),
        })
    }
}

/// Compares in a time that does not tell how much was right.
fn same(a: &[u8], b: &[u8]) -> bool {
    let differing = a.iter().zip(b).fold(0, |sum, (a, b)| sum | (a ^ b));
    a.len() == b.len() && differing == 0
}
