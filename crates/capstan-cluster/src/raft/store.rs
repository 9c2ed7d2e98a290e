//! Log, vote and snapshot in one redb file: what a replica promised is on disk before anybody hears of the promise.
use std::fmt::Debug;
use std::ops::{Bound, RangeBounds};
use std::path::Path;
use std::sync::Arc;

use capstan_proto::ClusterId;
use openraft::storage::{LogFlushed, RaftLogStorage};
use openraft::{AnyError, ErrorSubject, ErrorVerb, LogState, RaftLogReader, StorageError, StorageIOError, Vote};
use redb::{Database, Durability, ReadableDatabase, ReadableTable, StorageBackend, TableDefinition};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Entry, LogId, RaftId, SnapshotMeta, Types};

/// Entries by index.
const LOG: TableDefinition<u64, &[u8]> = TableDefinition::new("log");
/// Everything else, by name.
const META: TableDefinition<&str, &[u8]> = TableDefinition::new("meta");
const CLUSTER: &str = "cluster";
const VOTE: &str = "vote";
const COMMITTED: &str = "committed";
const PURGED: &str = "purged";
const SNAPSHOT: &str = "snapshot";
/// Memory for pages: the whole file is rarely larger.
const CACHE_BYTES: usize = 4 << 20;

/// Why a store cannot be used. What was promised before is still there unless the file is damaged.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database says no.
    #[error("the log of the cluster's state cannot be used: {0}; is the disk full or damaged?")]
    Database(Box<redb::Error>),
    /// A record that is none.
    #[error("the log of the cluster's state is damaged ({0}); move it away, then join the cluster again")]
    Damaged(String),
    /// Another cluster's file.
    #[error("the log of the cluster's state belongs to another cluster ({0:?})")]
    WrongCluster(ClusterId),
}

impl StoreError {
    /// Whether somebody else has the file open at the moment.
    pub fn is_busy(&self) -> bool {
        matches!(self, Self::Database(error) if matches!(**error, redb::Error::DatabaseAlreadyOpen))
    }
}

impl<E: Into<redb::Error>> From<E> for StoreError {
    fn from(error: E) -> Self {
        Self::Database(Box::new(error.into()))
    }
}

/// The file of one replica.
#[derive(Clone, Debug)]
pub struct Store {
    db: Arc<Database>,
}

fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, StoreError> {
    postcard::to_stdvec(value).map_err(|e| StoreError::Damaged(e.to_string()))
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, StoreError> {
    postcard::from_bytes(bytes).map_err(|e| StoreError::Damaged(e.to_string()))
}

/// Runs what waits for the disk. On a runtime of several threads the others go on meanwhile; a simulation has one thread,
/// where this is a plain call.
fn blocking<T>(work: impl FnOnce() -> T) -> T {
    use tokio::runtime::{Handle, RuntimeFlavor};
    match Handle::try_current().map(|h| h.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(work),
        _ => work(),
    }
}

impl Store {
    /// Opens a cluster's file, or makes it.
    pub fn open(path: &Path, cluster: ClusterId) -> Result<Self, StoreError> {
        Self::with(Database::builder().set_cache_size(CACHE_BYTES).create(path)?, cluster)
    }

    /// The same on another kind of disk.
    pub fn on(backend: impl StorageBackend, cluster: ClusterId) -> Result<Self, StoreError> {
        Self::with(Database::builder().set_cache_size(CACHE_BYTES).create_with_backend(backend)?, cluster)
    }

    fn with(db: Database, cluster: ClusterId) -> Result<Self, StoreError> {
        let store = Self { db: Arc::new(db) };
        let write = store.db.begin_write()?;
        {
            let mut meta = write.open_table(META)?;
            write.open_table(LOG)?;
            let known = meta.get(CLUSTER)?.map(|v| decode::<ClusterId>(v.value())).transpose()?;
            match known {
                Some(known) if known != cluster => return Err(StoreError::WrongCluster(known)),
                Some(_) => {}
                None => {
                    meta.insert(CLUSTER, encode(&cluster)?.as_slice())?;
                }
            }
        }
        write.commit()?;
        Ok(store)
    }

    fn get<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>, StoreError> {
        let read = self.db.begin_read()?;
        let meta = read.open_table(META)?;
        meta.get(key)?.map(|v| decode(v.value())).transpose()
    }

    fn put<T: Serialize>(&self, key: &str, value: &T, durability: Durability) -> Result<(), StoreError> {
        let bytes = encode(value)?;
        blocking(|| {
            let mut write = self.db.begin_write()?;
            write.set_durability(durability).map_err(|e| StoreError::Damaged(e.to_string()))?;
            write.open_table(META)?.insert(key, bytes.as_slice())?;
            write.commit()?;
            Ok(())
        })
    }

    pub(super) fn snapshot(&self) -> Result<Option<(SnapshotMeta, Vec<u8>)>, StoreError> {
        self.get(SNAPSHOT)
    }

    /// Keeps a snapshot, unless a newer one came while it was being made.
    pub(super) fn put_snapshot(&self, snapshot: &(SnapshotMeta, Vec<u8>)) -> Result<(), StoreError> {
        if self.snapshot()?.is_some_and(|(kept, _)| kept.last_log_id > snapshot.0.last_log_id) {
            return Ok(());
        }
        self.put(SNAPSHOT, snapshot, Durability::Immediate)
    }

    fn entries(&self, range: impl RangeBounds<u64>) -> Result<Vec<Entry>, StoreError> {
        let range: (Bound<u64>, Bound<u64>) = (range.start_bound().cloned(), range.end_bound().cloned());
        let read = self.db.begin_read()?;
        let log = read.open_table(LOG)?;
        log.range(range)?.map(|found| decode(found?.1.value())).collect()
    }

    fn log_state(&self) -> Result<LogState<Types>, StoreError> {
        let purged: Option<LogId> = self.get(PURGED)?;
        let read = self.db.begin_read()?;
        let last = match read.open_table(LOG)?.last()? {
            Some((_, bytes)) => Some(decode::<Entry>(bytes.value())?.log_id),
            None => purged,
        };
        Ok(LogState { last_purged_log_id: purged, last_log_id: last })
    }

    fn write_entries(&self, entries: impl IntoIterator<Item = Entry>) -> Result<(), StoreError> {
        let entries: Vec<(u64, Vec<u8>)> =
            entries.into_iter().map(|e| Ok((e.log_id.index, encode(&e)?))).collect::<Result<_, StoreError>>()?;
        blocking(|| {
            let write = self.db.begin_write()?;
            {
                let mut log = write.open_table(LOG)?;
                for (index, bytes) in &entries {
                    log.insert(index, bytes.as_slice())?;
                }
            }
            write.commit()?;
            Ok(())
        })
    }

    /// Removes entries, and notes up to where they were purged in the same transaction.
    fn remove_entries(&self, range: impl RangeBounds<u64>, purged: Option<LogId>) -> Result<(), StoreError> {
        let range: (Bound<u64>, Bound<u64>) = (range.start_bound().cloned(), range.end_bound().cloned());
        blocking(|| {
            let write = self.db.begin_write()?;
            write.open_table(LOG)?.retain_in(range, |_, _| false)?;
            if let Some(purged) = purged {
                write.open_table(META)?.insert(PURGED, encode(&purged)?.as_slice())?;
            }
            write.commit()?;
            Ok(())
        })
    }
}

/// openraft's word for a disk that fails: the replica stops.
pub(super) fn failed(
    subject: ErrorSubject<RaftId>,
    verb: ErrorVerb,
) -> impl FnOnce(StoreError) -> StorageError<RaftId> {
    move |error| StorageIOError::new(subject, verb, AnyError::new(&error)).into()
}

impl RaftLogReader<Types> for Store {
    async fn try_get_log_entries<R: RangeBounds<u64> + Clone + Debug + Send>(
        &mut self,
        range: R,
    ) -> Result<Vec<Entry>, StorageError<RaftId>> {
        self.entries(range).map_err(failed(ErrorSubject::Logs, ErrorVerb::Read))
    }
}

impl RaftLogStorage<Types> for Store {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<Types>, StorageError<RaftId>> {
        self.log_state().map_err(failed(ErrorSubject::Logs, ErrorVerb::Read))
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote<RaftId>) -> Result<(), StorageError<RaftId>> {
        self.put(VOTE, vote, Durability::Immediate).map_err(failed(ErrorSubject::Vote, ErrorVerb::Write))
    }

    async fn read_vote(&mut self) -> Result<Option<Vote<RaftId>>, StorageError<RaftId>> {
        self.get(VOTE).map_err(failed(ErrorSubject::Vote, ErrorVerb::Read))
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), StorageError<RaftId>> {
        // It only says how much of the log can be applied at once after a restart. Lost, a leader says it again.
        self.put(COMMITTED, &committed, Durability::None).map_err(failed(ErrorSubject::Store, ErrorVerb::Write))
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, StorageError<RaftId>> {
        self.get::<Option<LogId>>(COMMITTED).map(Option::flatten).map_err(failed(ErrorSubject::Store, ErrorVerb::Read))
    }

    async fn append<I>(&mut self, entries: I, callback: LogFlushed<Types>) -> Result<(), StorageError<RaftId>>
    where
        I: IntoIterator<Item = Entry> + Send,
        I::IntoIter: Send,
    {
        self.write_entries(entries).map_err(failed(ErrorSubject::Logs, ErrorVerb::Write))?;
        callback.log_io_completed(Ok(()));
        Ok(())
    }

    async fn truncate(&mut self, log_id: LogId) -> Result<(), StorageError<RaftId>> {
        self.remove_entries(log_id.index.., None).map_err(failed(ErrorSubject::Log(log_id), ErrorVerb::Delete))
    }

    async fn purge(&mut self, log_id: LogId) -> Result<(), StorageError<RaftId>> {
        self.remove_entries(..=log_id.index, Some(log_id)).map_err(failed(ErrorSubject::Log(log_id), ErrorVerb::Delete))
    }
}
