//! Responses in a file: one thread writes, and what came while it wrote goes into its next transaction.

use super::bounded::{Bounded, Bounds};
use super::{Counts, lock};
use filters::remember::{StoreError, Stored};
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use std::path::Path;
use std::sync::{Arc, Mutex};
use tokio::sync::{mpsc, oneshot};

/// Responses by id.
const RESPONSES: TableDefinition<&str, &[u8]> = TableDefinition::new("responses");
/// Id and size of each response, by the order in which they came.
const AGES: TableDefinition<u64, (&str, u64)> = TableDefinition::new("ages");
/// Writes that may wait; who comes later waits to wait.
const QUEUE: usize = 256;
/// Writes of one transaction.
const BATCH: usize = 64;

/// The file and what is in it.
pub(super) struct Disk {
    database: Arc<Database>,
    index: Arc<Mutex<Bounded<u64>>>,
    work: mpsc::Sender<Work>,
}

/// A change to the file, and who waits for it.
struct Work {
    change: Change,
    done: oneshot::Sender<Result<bool, StoreError>>,
}

enum Change {
    Put(Stored),
    Delete(String),
}

/// A response as it stands in the file.
#[derive(Serialize, Deserialize)]
struct Row<'a> {
    #[serde(borrow)]
    previous: Option<std::borrow::Cow<'a, str>>,
    #[serde(borrow)]
    input: &'a RawValue,
    #[serde(borrow)]
    response: &'a RawValue,
}

fn failed(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> StoreError {
    StoreError(error.into())
}

impl Disk {
    /// Opens the file, or begins it, and starts its writer.
    pub(super) fn open(path: &Path, bounds: Bounds, counts: Counts) -> Result<Self, StoreError> {
        let database = Arc::new(Database::create(path).map_err(failed)?);
        let (index, ages) = read_index(&database, bounds)?;
        counts.show(&index);
        let index = Arc::new(Mutex::new(index));
        let (work, inbox) = mpsc::channel(QUEUE);
        let writer = Writer {
            database: database.clone(),
            index: index.clone(),
            next_age: ages,
            counts,
        };
        std::thread::Builder::new()
            .name("responses".into())
            .spawn(move || writer.run(inbox))
            .map_err(failed)?;
        Ok(Self {
            database,
            index,
            work,
        })
    }

    pub(super) fn set_bounds(&self, bounds: Bounds) {
        lock(&self.index).set_bounds(bounds);
    }

    pub(super) fn bounds(&self) -> Bounds {
        lock(&self.index).bounds()
    }

    /// Ends when the response is on the disk.
    pub(super) fn put(
        &self,
        response: Stored,
    ) -> impl Future<Output = Result<bool, StoreError>> + Send + 'static {
        self.change(Change::Put(response))
    }

    pub(super) fn delete(
        &self,
        id: &str,
    ) -> impl Future<Output = Result<bool, StoreError>> + Send + 'static {
        self.change(Change::Delete(id.into()))
    }

    fn change(
        &self,
        change: Change,
    ) -> impl Future<Output = Result<bool, StoreError>> + Send + 'static {
        let work = self.work.clone();
        async move {
            let (done, told) = oneshot::channel();
            work.send(Work { change, done }).await.map_err(failed)?;
            told.await.map_err(failed)?
        }
    }

    pub(super) fn get(
        &self,
        id: &str,
    ) -> impl Future<Output = Result<Option<Arc<Stored>>, StoreError>> + Send + 'static {
        let known = lock(&self.index).get(id).is_some();
        let (database, id) = (self.database.clone(), Arc::<str>::from(id));
        async move {
            if !known {
                return Ok(None);
            }
            tokio::task::spawn_blocking(move || read(&database, id))
                .await
                .map_err(failed)?
        }
    }
}

fn read(database: &Database, id: Arc<str>) -> Result<Option<Arc<Stored>>, StoreError> {
    let transaction = database.begin_read().map_err(failed)?;
    let table = transaction.open_table(RESPONSES).map_err(failed)?;
    let Some(bytes) = table.get(&*id).map_err(failed)? else {
        return Ok(None); // deleted since it was looked for
    };
    let row: Row<'_> = serde_json::from_slice(bytes.value()).map_err(failed)?;
    Ok(Some(Arc::new(Stored {
        id,
        previous: row.previous.map(|id| Arc::from(&*id)),
        input: row.input.get().to_owned().into(),
        response: row.response.get().to_owned().into(),
    })))
}

/// What the file holds, oldest first, and the next age.
fn read_index(database: &Database, bounds: Bounds) -> Result<(Bounded<u64>, u64), StoreError> {
    let transaction = database.begin_write().map_err(failed)?;
    let mut index = Bounded::new(bounds);
    let mut next = 0;
    {
        // opening a table begins it
        let mut responses = transaction.open_table(RESPONSES).map_err(failed)?;
        let mut ages = transaction.open_table(AGES).map_err(failed)?;
        let mut gone = Vec::new();
        for row in ages.iter().map_err(failed)? {
            let (age, value) = row.map_err(failed)?;
            let (id, size) = value.value();
            next = age.value() + 1;
            gone.extend(index.put(id.into(), size, age.value()));
        }
        for (id, age) in gone {
            responses.remove(&*id).map_err(failed)?;
            ages.remove(age).map_err(failed)?;
        }
    }
    transaction.commit().map_err(failed)?;
    Ok((index, next))
}

/// The one that writes.
struct Writer {
    database: Arc<Database>,
    index: Arc<Mutex<Bounded<u64>>>,
    next_age: u64,
    counts: Counts,
}

impl Writer {
    /// Ends when nobody can send work any more.
    fn run(mut self, mut inbox: mpsc::Receiver<Work>) {
        while let Some(first) = inbox.blocking_recv() {
            let mut batch = vec![first];
            while batch.len() < BATCH
                && let Ok(more) = inbox.try_recv()
            {
                batch.push(more);
            }
            let written = self.write(&batch);
            if let Err(error) = &written {
                self.counts.failed();
                tracing::warn!(cause = %error.0, "responses not written");
                self.look_again();
            }
            self.counts.show(&lock(&self.index));
            for (number, work) in batch.into_iter().enumerate() {
                let told = match &written {
                    Ok(found) => Ok(found[number]),
                    Err(error) => Err(failed(error.0.to_string())),
                };
                let _ = work.done.send(told); // who asked may have left
            }
        }
    }

    /// Makes all changes or none. Says of each whether there was something to change.
    fn write(&mut self, batch: &[Work]) -> Result<Vec<bool>, StoreError> {
        let transaction = self.database.begin_write().map_err(failed)?;
        let mut found = Vec::with_capacity(batch.len());
        let mut evicted = 0;
        {
            let mut responses = transaction.open_table(RESPONSES).map_err(failed)?;
            let mut ages = transaction.open_table(AGES).map_err(failed)?;
            for work in batch {
                match &work.change {
                    Change::Put(stored) => {
                        let row = row(stored)?;
                        let age = self.next_age;
                        self.next_age += 1;
                        responses.insert(&*stored.id, &*row).map_err(failed)?;
                        let entry = (&*stored.id, stored.size());
                        ages.insert(age, entry).map_err(failed)?;
                        let gone = lock(&self.index).put(stored.id.clone(), stored.size(), age);
                        evicted += gone.len();
                        for (id, age) in gone {
                            responses.remove(&*id).map_err(failed)?;
                            ages.remove(age).map_err(failed)?;
                        }
                        found.push(true);
                    }
                    Change::Delete(id) => {
                        let age = lock(&self.index).remove(id);
                        if let Some(age) = age {
                            responses.remove(id.as_str()).map_err(failed)?;
                            ages.remove(age).map_err(failed)?;
                        }
                        found.push(age.is_some());
                    }
                }
            }
        }
        transaction.commit().map_err(failed)?;
        self.counts.evicted(evicted);
        Ok(found)
    }

    /// After a failure the index says again what the file holds.
    fn look_again(&mut self) {
        let bounds = lock(&self.index).bounds();
        match read_index(&self.database, bounds) {
            Ok((index, next)) => {
                *lock(&self.index) = index;
                self.next_age = next;
            }
            Err(error) => tracing::warn!(cause = %error.0, "kept responses cannot be read"),
        }
    }
}

fn row(stored: &Stored) -> Result<Vec<u8>, StoreError> {
    let row = Row {
        previous: stored.previous.as_deref().map(Into::into),
        input: serde_json::from_slice(&stored.input).map_err(failed)?,
        response: serde_json::from_slice(&stored.response).map_err(failed)?,
    };
    serde_json::to_vec(&row).map_err(failed)
}
