//! Copies of layers: every node keeps as many as are asked for, from one another, and deletes none that is the last.
//!
//! No node decides for others. Each hears what all have, works out by the same rule who should copy what, and does its own
//! share; two that see different news may make one copy too many, which makes way when space is short.
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use capstan_proto::weights::{Catalogue, ModelRecord, Part, PartKind};
use capstan_proto::{ContentHash, NodeId};
use tokio::time::{MissedTickBehavior, interval, sleep};

use crate::assembling;
use crate::catalogue::copies;
use crate::node::Shared;
use crate::pulling::tell_all;

/// How often nodes tell each other what they have, when nothing changes.
const EXCHANGE_INTERVAL: Duration = Duration::from_secs(5);
/// How often a node looks for copies that it should make.
const COPY_INTERVAL: Duration = Duration::from_secs(5);
/// Hash trees take so small a share of what they are for: one part in two hundred is enough.
const TREE_SHARE: u64 = 200;

/// Sees to it that the store deletes no last copy, and keeps its limit.
pub(crate) fn guard(shared: &Arc<Shared>) {
    shared.store.set_limit(shared.config.disk_limit_bytes);
    let weak = Arc::downgrade(shared);
    shared.store.ask_before_deleting(move |hash| {
        let weak = weak.clone();
        Box::pin(async move {
            match weak.upgrade() {
                Some(shared) => shared.may_delete(ContentHash(hash)).await,
                None => false,
            }
        })
    });
}

impl Shared {
    /// Takes in what another member knows of models, and answers with what is known here.
    pub(crate) fn hear_catalogue(&self, from: NodeId, told: Catalogue) -> Catalogue {
        if told.cluster == self.membership.cluster() {
            // What is in a record is known to all, and need not be held any more until it is.
            for part in told.records.iter().flat_map(|r| &r.parts) {
                assembling::settled(self, part.hash);
            }
            if self.models.hear(from, told) {
                self.models.changed.notify_one();
            }
        }
        self.catalogue()
    }
}

/// Tells the others now and then, and at once when something has changed.
pub(crate) async fn exchange_loop(shared: Arc<Shared>) {
    let mut ticks = interval(EXCHANGE_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = shared.models.changed.notified() => {}
        }
        shared.models.forget_others(|node| shared.membership.is_member(node));
        drop_removed(&shared).await;
        tell_all(&shared).await;
    }
}

/// Deletes what belongs only to models that were removed. What a stage uses stays, and makes way later.
pub(crate) async fn drop_removed(shared: &Shared) {
    for (id, parts) in shared.models.take_orphans() {
        let links = shared.models.dir().join(id.short());
        tokio::fs::remove_dir_all(links).await.ok();
        for hash in parts {
            if shared.store.offered(&hash.0).is_some() {
                shared.store.withdraw(&hash.0).await.ok();
            }
            if !shared.store.is_held(&hash.0)
                && let Err(error) = shared.store.remove(&hash.0).await
            {
                tracing::warn!(%error, "a part of a model that was removed could not be deleted");
            }
        }
    }
}

/// Makes the copies that are this node's to make, one after the other.
pub(crate) async fn copy_loop(shared: Arc<Shared>) {
    loop {
        sleep(COPY_INTERVAL).await;
        // One that fails is tried again in the next round, after the others.
        let mut failed = HashSet::new();
        while let Some(part) = next_copy(&shared, &failed) {
            let from = shared.dial_addrs(&shared.holders(part.hash));
            tracing::info!(part = %part.hash.short(), bytes = part.bytes, sources = from.len(), "copying, so that no layer has too few copies");
            match shared.store.fetch_from(&shared.endpoint, from, part.hash.0, part.bytes, |_, _| {}).await {
                Ok(_) => shared.models.changed.notify_one(),
                Err(error) => {
                    tracing::warn!(%error, "a copy could not be made; it is tried again later");
                    failed.insert(part.hash);
                }
            }
        }
    }
}

/// A node as far as copies are concerned.
struct Shelf {
    id: NodeId,
    online: bool,
    free_bytes: u64,
}

/// A part that this node is to copy now.
fn next_copy(shared: &Shared, failed: &HashSet<ContentHash>) -> Option<Part> {
    let mine = shared.holdings();
    let mut shelves = vec![Shelf { id: shared.id, online: true, free_bytes: mine.free_bytes }];
    for member in shared.membership.others() {
        let Some(theirs) = shared.models.holdings_of(member.id) else { continue };
        let online = shared.membership.online(member.id);
        shelves.push(Shelf { id: member.id, online, free_bytes: theirs.free_bytes });
    }
    let has = |node: NodeId, hash: ContentHash| match node == shared.id {
        true => mine.parts.binary_search(&hash).is_ok(),
        false => shared.models.holdings_of(node).is_some_and(|h| h.parts.binary_search(&hash).is_ok()),
    };
    let records = shared.models.list();
    let mut ours = records.iter().flat_map(|r| wanted(r, &shelves, &has)).filter(|(node, _)| *node == shared.id);
    ours.find(|(_, part)| !failed.contains(&part.hash)).map(|(_, part)| part)
}

/// Which node should copy which part of a model now.
fn wanted(record: &ModelRecord, shelves: &[Shelf], has: &impl Fn(NodeId, ContentHash) -> bool) -> Vec<(NodeId, Part)> {
    let nodes: Vec<NodeId> = shelves.iter().map(|s| s.id).collect();
    let layers = copies(record, has, &nodes);
    let mut wanted = Vec::new();
    for part in &record.parts {
        let holders = shelves.iter().filter(|s| has(s.id, part.hash)).count();
        if !shelves.iter().any(|s| s.online && has(s.id, part.hash)) {
            continue;
        }
        // Whoever has the head can open the model, so everyone gets it.
        let (target, copies) = match (&part.kind, record.layers_of(part)) {
            (PartKind::Head(_), _) => (shelves.len(), holders),
            (_, Some(range)) => {
                let of_layers = layers.iter().take(range.end() as usize).skip(range.start() as usize);
                (usize::from(record.replicas), of_layers.map(Vec::len).min().unwrap_or(holders))
            }
            (_, None) => (usize::from(record.replicas), holders),
        };
        let missing = target.saturating_sub(copies);
        let need = part.bytes.saturating_add(part.bytes / TREE_SHARE);
        // A node that has these layers in another part makes no more copies of them by having this one too.
        let news = |s: &&Shelf| match record.layers_of(part) {
            Some(range) => {
                let mut of_layers = layers.iter().take(range.end() as usize).skip(range.start() as usize);
                of_layers.any(|l| !l.contains(&s.id))
            }
            None => true,
        };
        let mut able: Vec<&Shelf> =
            shelves.iter().filter(|s| s.online && !has(s.id, part.hash) && s.free_bytes > need).filter(news).collect();
        able.sort_by_key(|s| (std::cmp::Reverse(s.free_bytes), s.id));
        wanted.extend(able.into_iter().take(missing).map(|s| (s.id, part.clone())));
    }
    wanted
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use capstan_proto::{LayerRange, ModelId};

    use super::*;

    fn part(n: u8, bytes: u64, kind: PartKind) -> Part {
        Part { hash: ContentHash([n; 32]), bytes, kind }
    }

    fn layers(a: u32, b: u32) -> PartKind {
        PartKind::Layers(LayerRange::new(a, b).unwrap())
    }

    /// Copies until nobody is to copy any more: who then has which part.
    fn settle(
        replicas: u16,
        parts: Vec<Part>,
        mut held: BTreeSet<(u8, u8)>,
        free: &[u64],
        online: &[bool],
    ) -> BTreeSet<(u8, u8)> {
        let record = ModelRecord {
            id: ModelId([1; 32]),
            name: "m".into(),
            source: "s".into(),
            revision: None,
            architecture: "llama".into(),
            layers: 4,
            files: vec![],
            parts,
            replicas,
            created_unix_s: 0,
            stamp: 0,
            removed: false,
        };
        let mut free = free.to_vec();
        for _ in 0..100 {
            let shelf =
                |(i, free): (usize, &u64)| Shelf { id: NodeId([i as u8; 32]), online: online[i], free_bytes: *free };
            let shelves: Vec<_> = free.iter().enumerate().map(shelf).collect();
            let has = |node: NodeId, hash: ContentHash| held.contains(&(node.0[0], hash.0[0]));
            let Some((node, part)) = wanted(&record, &shelves, &has).into_iter().next() else { return held };
            free[usize::from(node.0[0])] -= part.bytes;
            assert!(held.insert((node.0[0], part.hash.0[0])), "copied twice");
        }
        panic!("it never settles");
    }

    #[test]
    fn every_layer_gets_its_copies_where_there_is_room_and_everyone_the_head() {
        let parts = || vec![part(1, 10, layers(0, 2)), part(2, 10, layers(2, 4)), part(9, 1, PartKind::Head(vec![]))];
        let held = || BTreeSet::from([(0, 1), (1, 2), (0, 9)]);
        let settled = settle(2, parts(), held(), &[100, 100, 50], &[true; 3]);
        let count = |p: u8| settled.iter().filter(|(_, part)| *part == p).count();
        assert_eq!((count(1), count(2), count(9)), (2, 2, 3));
        // Without room there are no copies, and a node that is away gets none.
        let settled = settle(2, parts(), held(), &[5, 5, 100], &[true, true, false]);
        assert_eq!(settled.len(), 4, "{settled:?}: only the head");
        // A shard inside of another is no reason for more.
        let mut more = parts();
        more.push(part(3, 20, layers(0, 4)));
        let settled = settle(1, more, BTreeSet::from([(0, 1), (1, 2), (2, 3)]), &[100; 3], &[true; 3]);
        assert_eq!(settled.len(), 3);
    }
}
