//! Requests that run, by the id they are logged under: a way to end them from elsewhere.

use super::ApiState;
use super::failure::Failure;
use crate::engine::request::Canceller;
use axum::Json;
use axum::extract::{Path, State};
use protocol::{ApiError, ErrorKind};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// All of them. Copies share one table.
#[derive(Debug, Clone, Default)]
pub struct Running {
    table: Arc<Mutex<Table>>,
}

#[derive(Debug, Default)]
struct Table {
    next: u64,
    /// Clients choose the ids, so several requests may have the same.
    requests: HashMap<String, HashMap<u64, Vec<Canceller>>>,
}

/// A place in the table; given up when dropped.
#[derive(Debug)]
pub(super) struct Entry {
    running: Running,
    id: String,
    number: u64,
}

impl Running {
    /// Notes a request with what ends each of its answers.
    pub(super) fn enter(&self, id: &str, cancellers: Vec<Canceller>) -> Entry {
        let mut table = self.table();
        let number = table.next;
        table.next += 1;
        let same = table.requests.entry(id.to_owned()).or_default();
        same.insert(number, cancellers);
        Entry {
            running: self.clone(),
            id: id.to_owned(),
            number,
        }
    }

    /// Ends every request with this id; says how many there were.
    fn cancel(&self, id: &str) -> usize {
        let table = self.table();
        let Some(requests) = table.requests.get(id) else {
            return 0;
        };
        requests.values().flatten().for_each(Canceller::cancel);
        requests.len()
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // Each change is an insertion or a removal: a panic leaves nothing half done.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut table = self.running.table();
        if let Some(same) = table.requests.get_mut(&self.id) {
            same.remove(&self.number);
            if same.is_empty() {
                table.requests.remove(&self.id);
            }
        }
    }
}

/// `DELETE /requests/{id}`: the id is the `x-request-id` the request came with or was given. Its client is told.
pub(super) async fn cancel(
    State(state): State<Arc<ApiState>>,
    Path(id): Path<String>,
) -> Result<Json<Value>, Failure> {
    match state.running.cancel(&id) {
        0 => {
            let message = format!("no request `{id}` is running; it may have ended");
            let error = ApiError::new(ErrorKind::RequestNotFound, message);
            Err(ApiError {
                param: Some("id".into()),
                ..error
            }
            .into())
        }
        cancelled => Ok(Json(json!({"id": id, "cancelled": cancelled}))),
    }
}
