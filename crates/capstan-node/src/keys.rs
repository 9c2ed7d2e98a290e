//! The cluster's API keys on this node: kept on disk by their hashes, told to the other members, asked by the HTTP layer.
//!
//! Every member holds all of them, so a key works at every node, also while others are away. A change is told to all
//! members at once, and each exchange of news compares digests, so whoever was away hears of it with its first poll.
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use capstan_cluster::{ApiKeys, KeyError};
use capstan_proto::control::{KEYS_SINCE, Request};
use capstan_proto::keys::{KeyEntry, KeyInfo, KeyNews, KeyScope, NewKey};
use capstan_proto::manage::ManageError;
use capstan_proto::{ClusterId, NodeId};
use serde::{Deserialize, Serialize};

use crate::error::{CallError, NodeError};
use crate::files;
use crate::membership::{Membership, now_s};
use crate::node::{PUSH_TIMEOUT, Shared};

#[derive(Serialize, Deserialize)]
struct Saved {
    cluster: ClusterId,
    keys: Vec<KeyEntry>,
}

struct State {
    /// The cluster whose keys these are.
    cluster: ClusterId,
    keys: ApiKeys,
}

/// The keys that this node knows.
pub(crate) struct KeyRing {
    path: PathBuf,
    membership: Arc<Membership>,
    state: Mutex<State>,
}

impl KeyRing {
    /// Takes up what was saved.
    pub(crate) fn open(data_dir: &Path, membership: Arc<Membership>) -> Result<Self, NodeError> {
        let path = data_dir.join("keys.json");
        let saved = files::read_json::<Saved>(&path)?;
        let state = match saved {
            Some(saved) => State { cluster: saved.cluster, keys: saved.keys.into_iter().collect() },
            None => State { cluster: membership.cluster(), keys: ApiKeys::default() },
        };
        Ok(Self { path, membership, state: Mutex::new(state) })
    }

    /// The keys of the cluster that this node is in now. Those of one that it has left let nobody in any more.
    fn state(&self) -> MutexGuard<'_, State> {
        let cluster = self.membership.cluster();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.cluster != cluster {
            *state = State { cluster, keys: ApiKeys::default() };
        }
        state
    }

    /// Writes under the lock, so that two changes cannot be saved in the wrong order.
    fn save(&self, state: &State) -> std::io::Result<()> {
        let keys = state.keys.entries().cloned().collect();
        files::write_json(&self.path, &Saved { cluster: state.cluster, keys })
    }

    /// Makes a change and keeps it only if it could be saved: a key that a restart forgets is worse than none.
    fn change<T>(&self, change: impl FnOnce(&mut ApiKeys) -> Result<T, KeyError>) -> Result<T, ManageError> {
        let mut state = self.state();
        let mut changed = State { cluster: state.cluster, keys: state.keys.clone() };
        let made = change(&mut changed.keys).map_err(refused)?;
        self.save(&changed).map_err(|e| {
            let path = self.path.display();
            ManageError::new(500, format!("{path} could not be written ({e}), so nothing was changed; free some space"))
        })?;
        *state = changed;
        Ok(made)
    }

    pub(crate) fn add(&self, name: &str, scope: KeyScope) -> Result<NewKey, ManageError> {
        let random = rand::random();
        let (key, entry) = self.change(|keys| keys.add(name, scope, &random, now_s()))?;
        Ok(NewKey { key, info: KeyInfo::from(&entry) })
    }

    pub(crate) fn revoke(&self, name: &str) -> Result<usize, ManageError> {
        self.change(|keys| keys.revoke(name, now_s()))
    }

    /// Name and scope of the good key that this text is.
    pub(crate) fn check(&self, shown: &str) -> Option<(String, KeyScope)> {
        self.state().keys.check(shown).map(|entry| (entry.name.clone(), entry.scope))
    }

    pub(crate) fn list(&self) -> Vec<KeyInfo> {
        let mut all: Vec<KeyInfo> = self.state().keys.entries().map(KeyInfo::from).collect();
        all.sort_by(|a, b| (a.created_unix_s, &a.name).cmp(&(b.created_unix_s, &b.name)));
        all
    }

    /// What is told to a member that has this digest, or none known.
    fn news(&self, theirs: Option<[u8; 32]>) -> KeyNews {
        let state = self.state();
        let digest = state.keys.digest();
        let entries = match theirs {
            Some(theirs) if theirs != digest => state.keys.entries().cloned().collect(),
            _ => vec![],
        };
        KeyNews { cluster: state.cluster, digest, entries }
    }

    /// Takes in what a member tells, and gives the answer. None for another cluster's: a node that moves may still have
    /// a word for this one on its way.
    pub(crate) fn hear(&self, news: KeyNews) -> Option<KeyNews> {
        let mut state = self.state();
        if news.cluster != state.cluster {
            return None;
        }
        if state.keys.merge(news.entries)
            && let Err(error) = self.save(&state)
        {
            tracing::error!(%error, "API keys could not be saved; after a restart this node has to hear of them again");
        }
        drop(state);
        Some(self.news(Some(news.digest)))
    }
}

fn refused(error: KeyError) -> ManageError {
    let status = match error {
        KeyError::BadName(_) => 400,
        KeyError::Unknown(_) => 404,
        KeyError::Taken(_) | KeyError::Full => 409,
    };
    ManageError::new(status, error.to_string())
}

/// Compares keys with a member, and brings both up to date where they differ.
pub(crate) async fn exchange(shared: &Shared, node: NodeId) -> Result<(), CallError> {
    let mut ask = shared.keys.news(None);
    // One round asks, one tells what the other lacks. Changes in between are for the next time.
    for _ in 0..2 {
        let request = Request::Keys(Box::new(ask));
        let theirs: KeyNews = match shared.client.call(node, &request, PUSH_TIMEOUT).await {
            // It knows nothing of keys and asks for none: its own API has another way to say who may use it.
            Err(CallError::TooOld { needs: KEYS_SINCE, .. }) => return Ok(()),
            other => other?,
        };
        theirs.check()?;
        let digest = theirs.digest;
        shared.keys.hear(theirs);
        ask = shared.keys.news(Some(digest));
        if ask.entries.is_empty() {
            break;
        }
    }
    Ok(())
}

/// Tells all members that are there of a change, and waits until they have heard.
pub(crate) async fn tell_all(shared: &Shared) {
    let others = shared.membership.others().into_iter().filter(|m| shared.membership.online(m.id));
    let told = others.map(|m| async move {
        if let Err(error) = exchange(shared, m.id).await {
            tracing::debug!(node = m.name, %error, "a change of the API keys could not be told at once");
        }
    });
    futures::future::join_all(told).await;
}
