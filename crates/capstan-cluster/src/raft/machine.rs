//! The state behind the log. It lives in memory; on disk are the last snapshot and the log since.
use std::sync::Arc;

use openraft::storage::RaftStateMachine;
use openraft::{
    AnyError, EntryPayload, ErrorSubject, ErrorVerb, RaftSnapshotBuilder, Snapshot, StorageError, StorageIOError,
};
use tokio::sync::watch;

use super::store::failed;
use super::{Entry, LogId, RaftId, SnapshotMeta, Store, StoreError, StoredMembership, Types};
use crate::command::{Outcome, Proposal, Response};
use crate::state::State;

/// The state after an entry of the log.
#[derive(Clone, Debug, Default)]
pub struct Applied {
    /// The entry's index; none before the first.
    pub index: Option<u64>,
    /// The state.
    pub state: Arc<State>,
}

/// Is told of every change that is applied here, with what came of it. A snapshot comes without a change.
pub type Observer = Arc<dyn Fn(&Applied, Option<(&Proposal, &Outcome)>) + Send + Sync>;

/// The state behind the log.
pub(super) struct Machine {
    store: Store,
    last: Option<LogId>,
    membership: StoredMembership,
    told: watch::Sender<Applied>,
    observer: Option<Observer>,
}

impl Machine {
    /// Takes up the last snapshot.
    pub(super) fn open(
        store: Store,
        observer: Option<Observer>,
    ) -> Result<(Self, watch::Receiver<Applied>), StoreError> {
        let (told, hear) = watch::channel(Applied::default());
        let mut machine = Self { last: None, membership: StoredMembership::default(), told, observer, store };
        if let Some((meta, bytes)) = machine.store.snapshot()? {
            let state = postcard::from_bytes(&bytes).map_err(|e| StoreError::Damaged(e.to_string()))?;
            machine.replace(&meta, state);
        }
        Ok((machine, hear))
    }

    fn replace(&mut self, meta: &SnapshotMeta, state: State) {
        self.last = meta.last_log_id;
        self.membership = meta.last_membership.clone();
        self.tell(Arc::new(state), None);
    }

    fn tell(&self, state: Arc<State>, change: Option<(&Proposal, &Outcome)>) {
        let applied = Applied { index: self.last.map(|l| l.index), state };
        if let Some(observer) = &self.observer {
            observer(&applied, change);
        }
        self.told.send_replace(applied);
    }

    fn state(&self) -> Arc<State> {
        self.told.borrow().state.clone()
    }
}

impl RaftStateMachine<Types> for Machine {
    type SnapshotBuilder = Builder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), StorageError<RaftId>> {
        Ok((self.last, self.membership.clone()))
    }

    async fn apply<I>(&mut self, entries: I) -> Result<Vec<Outcome>, StorageError<RaftId>>
    where
        I: IntoIterator<Item = Entry> + Send,
        I::IntoIter: Send,
    {
        let mut outcomes = Vec::new();
        for entry in entries {
            self.last = Some(entry.log_id);
            match entry.payload {
                EntryPayload::Blank => {
                    self.tell(self.state(), None);
                    outcomes.push(Ok(Response::Done));
                }
                EntryPayload::Membership(membership) => {
                    self.membership = StoredMembership::new(Some(entry.log_id), membership);
                    self.tell(self.state(), None);
                    outcomes.push(Ok(Response::Done));
                }
                EntryPayload::Normal(proposal) => {
                    let mut state = self.state();
                    let outcome = Arc::make_mut(&mut state).apply(&proposal);
                    self.tell(state, Some((&proposal, &outcome)));
                    outcomes.push(outcome);
                }
            }
        }
        Ok(outcomes)
    }

    async fn get_snapshot_builder(&mut self) -> Builder {
        let meta = SnapshotMeta {
            last_log_id: self.last,
            last_membership: self.membership.clone(),
            snapshot_id: self.last.map_or_else(String::new, |l| format!("{}-{}", l.leader_id.term, l.index)),
        };
        Builder { store: self.store.clone(), meta, state: self.state() }
    }

    async fn begin_receiving_snapshot(&mut self) -> Result<Box<Vec<u8>>, StorageError<RaftId>> {
        Ok(Box::default())
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta,
        snapshot: Box<Vec<u8>>,
    ) -> Result<(), StorageError<RaftId>> {
        let subject = || ErrorSubject::Snapshot(Some(meta.signature()));
        // It was read once before it was accepted ([`super::replica`]), so this is no stranger's word any more.
        let state: State = postcard::from_bytes(&snapshot)
            .map_err(|e| StorageIOError::new(subject(), ErrorVerb::Read, AnyError::new(&e)))?;
        self.store.put_snapshot(&(meta.clone(), *snapshot)).map_err(failed(subject(), ErrorVerb::Write))?;
        self.replace(meta, state);
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot<Types>>, StorageError<RaftId>> {
        let kept = self.store.snapshot().map_err(failed(ErrorSubject::Snapshot(None), ErrorVerb::Read))?;
        Ok(kept.map(|(meta, bytes)| Snapshot { meta, snapshot: Box::new(bytes) }))
    }
}

/// Writes a snapshot of the state as it was when it was asked for.
pub(super) struct Builder {
    store: Store,
    meta: SnapshotMeta,
    state: Arc<State>,
}

impl RaftSnapshotBuilder<Types> for Builder {
    async fn build_snapshot(&mut self) -> Result<Snapshot<Types>, StorageError<RaftId>> {
        let subject = || ErrorSubject::Snapshot(Some(self.meta.signature()));
        let bytes = postcard::to_stdvec(&*self.state)
            .map_err(|e| StorageIOError::new(subject(), ErrorVerb::Write, AnyError::new(&e)))?;
        let snapshot = (self.meta.clone(), bytes);
        self.store.put_snapshot(&snapshot).map_err(failed(subject(), ErrorVerb::Write))?;
        Ok(Snapshot { meta: snapshot.0, snapshot: Box::new(snapshot.1) })
    }
}
