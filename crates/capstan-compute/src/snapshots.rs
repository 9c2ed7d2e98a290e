//! The files of a stage's KV snapshots. They lie in memory, in a folder that outlives the process: a stage whose process
//! was lost finds what its predecessor saved.
//!
//! ```text
//! SLOT-MARK-ROWS.kv     what llama.cpp keeps of the slot; the name appears when it is whole
//! SLOT-MARK-ROWS.note   driver only: the tokens that it is of, as JSON
//! ```
use std::collections::HashSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use capstan_engine::{Saved, Stage, in_flight_max};
use capstan_llama::LlamaStage;
use capstan_proto::child::SnapshotSpec;
use capstan_proto::data::{KvOp, MicroBatch};
use serde::{Deserialize, Serialize};

/// Largest note: five million tokens, far beyond any context.
const NOTE_BYTES_MAX: u64 = 64 << 20;
/// A file that is being written.
const PART: &str = "part.kv";
/// A file that is being read: one that ends its process must not do so again.
const TRIED: &str = "tried.kv";

/// A stage whose slots can be saved.
pub(crate) trait Keeps: Stage {
    /// Bytes that a snapshot of the slot takes, to a few.
    fn snapshot_bytes(&mut self, slot: u32) -> Result<u64, String>;
    /// Writes the slot to a file; gives its bytes, and the rows in it.
    fn save(&mut self, slot: u32, path: &Path) -> Result<(u64, u32), String>;
    /// Fills an empty slot with so many rows from a file; after an error it is empty.
    fn restore(&mut self, slot: u32, path: &Path, rows: u32) -> Result<(), String>;
}

impl Keeps for LlamaStage {
    fn snapshot_bytes(&mut self, slot: u32) -> Result<u64, String> {
        self.context_mut().snapshot_bytes(slot).map_err(|e| e.to_string())
    }

    fn save(&mut self, slot: u32, path: &Path) -> Result<(u64, u32), String> {
        let context = self.context_mut();
        let bytes = context.save(slot, path).map_err(|e| e.to_string())?;
        Ok((bytes, context.next_pos(slot).unwrap_or(0)))
    }

    fn restore(&mut self, slot: u32, path: &Path, rows: u32) -> Result<(), String> {
        self.context_mut().restore(slot, path, rows).map_err(|e| e.to_string())
    }
}

#[derive(Debug)]
struct File {
    slot: u32,
    mark: u64,
    rows: u32,
    bytes: u64,
    /// The step from which on nobody asks for it any more; none while it is its slot's last.
    due: Option<u64>,
}

impl File {
    fn name(&self, kind: &str) -> String {
        format!("{}-{:016x}-{}.{kind}", self.slot, self.mark, self.rows)
    }

    /// What a file's name says.
    fn parse(name: &str, bytes: u64) -> Option<Self> {
        let mut parts = name.strip_suffix(".kv")?.split('-');
        let (slot, mark, rows) = (parts.next()?, parts.next()?, parts.next()?);
        let file = Self {
            slot: slot.parse().ok()?,
            mark: u64::from_str_radix(mark, 16).ok()?,
            rows: rows.parse().ok()?,
            bytes,
            due: None,
        };
        (file.name("kv") == name).then_some(file)
    }
}

/// What whoever restores a snapshot must know of it, beside its name.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Note {
    tokens: Vec<i32>,
    asked: u32,
    grid_rows: u32,
}

/// The snapshots of this stage.
#[derive(Debug)]
pub(crate) struct Snapshots {
    /// None keeps none.
    spec: Option<SnapshotSpec>,
    files: Vec<File>,
    /// When so many more steps are here, a step has gone all the way round.
    in_flight_max: u64,
}

impl Snapshots {
    /// Those that are in the folder already, and room for more. What was not finished, or failed, goes.
    pub(crate) fn open(spec: Option<SnapshotSpec>, stages: u16) -> Self {
        let (mut files, mut others) = (Vec::new(), Vec::<OsString>::new());
        if let Some(spec) = &spec {
            for entry in std::fs::read_dir(&spec.folder).into_iter().flatten().flatten() {
                let name = entry.file_name();
                let bytes = entry.metadata().map_or(0, |meta| meta.len());
                match name.to_str().and_then(|name| File::parse(name, bytes)) {
                    Some(file) => files.push(file),
                    None => others.push(name),
                }
            }
            // Whose reading ended the process before is not known to be the only one that would.
            if others.iter().any(|name| name == TRIED) {
                others.extend(files.drain(..).map(|file| file.name("kv").into()));
            }
            let notes: HashSet<String> = files.iter().map(|file| file.name("note")).collect();
            for name in others.iter().filter(|name| name.to_str().is_none_or(|name| !notes.contains(name))) {
                std::fs::remove_file(spec.folder.join(name)).ok();
            }
        }
        Self { spec, files, in_flight_max: u64::from(in_flight_max(stages)) }
    }

    /// Whether any can be kept.
    pub(crate) fn are_kept(&self) -> bool {
        self.spec.is_some()
    }

    /// A new epoch begins: its steps count from 0.
    pub(crate) fn reset(&mut self) {
        self.files.iter_mut().for_each(|file| file.due = None);
    }

    /// Driver: those that it knows the tokens of, in no order.
    pub(crate) fn kept(&self) -> Vec<Saved> {
        self.files.iter().filter_map(|file| self.read_note(file)).collect()
    }

    /// Driver: which slots a micro-batch that came all the way round restores.
    pub(crate) fn restored(batch: &MicroBatch) -> Vec<u32> {
        let slot = |op: &KvOp| if let KvOp::Restore { slot, .. } = op { Some(*slot) } else { None };
        batch.ops.iter().filter_map(slot).collect()
    }

    /// To be done before a micro-batch is computed: restores what it says. What is not here is cleared instead, and the
    /// next stages are told so.
    pub(crate) fn before(&mut self, stage: &mut impl Keeps, batch: &mut MicroBatch) {
        for op in &mut batch.ops {
            let KvOp::Restore { slot, mark } = *op else { continue };
            if let Err(reason) = self.restore(stage, slot, mark) {
                tracing::info!(slot, mark, reason, "a sequence is computed again");
                *op = KvOp::Clear { slot };
            }
        }
    }

    /// To be done when it was computed: saves what it says. The driver knows the tokens.
    pub(crate) fn after(&mut self, stage: &mut impl Keeps, batch: &MicroBatch, saved: Option<&Saved>) {
        self.forget(|file| file.due.is_some_and(|due| due <= batch.step));
        for op in &batch.ops {
            let KvOp::Save { slot, mark } = *op else { continue };
            let note = saved.filter(|saved| saved.mark == mark);
            if let Err(reason) = self.save(stage, slot, mark, batch.step, note) {
                tracing::debug!(slot, mark, reason, "a sequence was not saved");
            }
        }
    }

    fn path(&self, name: &str) -> Option<PathBuf> {
        Some(self.spec.as_ref()?.folder.join(name))
    }

    fn restore(&mut self, stage: &mut impl Keeps, slot: u32, mark: u64) -> Result<(), String> {
        let file = self.files.iter().find(|f| (f.slot, f.mark) == (slot, mark)).ok_or("it was not saved here")?;
        let (rows, paths) = (file.rows, (self.path(&file.name("kv")), self.path(TRIED)));
        let (Some(path), Some(tried)) = paths else { return Err("nothing is kept".into()) };
        let done = std::fs::rename(&path, &tried).map_err(|e| e.to_string());
        let done = done.and_then(|()| stage.restore(slot, &tried, rows));
        let done = done.and_then(|()| std::fs::rename(&tried, &path).map_err(|e| e.to_string()));
        if done.is_err() {
            std::fs::remove_file(&tried).ok();
            self.forget(|file| (file.slot, file.mark) == (slot, mark));
        }
        done
    }

    fn save(
        &mut self,
        stage: &mut impl Keeps,
        slot: u32,
        mark: u64,
        step: u64,
        note: Option<&Saved>,
    ) -> Result<(), String> {
        let (Some(spec), Some(part)) = (&self.spec, self.path(PART)) else { return Err("nothing is kept".into()) };
        let bytes_max = spec.bytes_max;
        let wanted = stage.snapshot_bytes(slot)?;
        if wanted > bytes_max {
            return Err(format!("it takes {wanted} bytes, and {bytes_max} may be used in all"));
        }
        while self.files.iter().map(|file| file.bytes).sum::<u64>() > bytes_max - wanted {
            let Some(oldest) = self.files.iter().map(|file| file.mark).min() else { break };
            self.forget(|file| file.mark == oldest);
        }
        let (bytes, rows) = stage.save(slot, &part).inspect_err(|_| _ = std::fs::remove_file(&part))?;
        let file = File { slot, mark, rows, bytes, due: None };
        let written = self.write_note(&file, note).and_then(|()| {
            let path = self.path(&file.name("kv")).unwrap_or_default();
            std::fs::rename(&part, path)
        });
        written.inspect_err(|_| _ = std::fs::remove_file(&part)).map_err(|e| e.to_string())?;
        // The one before is wanted until this one is known to have been saved by every stage.
        let due = Some(step.saturating_add(self.in_flight_max));
        self.files.iter_mut().filter(|old| old.slot == slot && old.due.is_none()).for_each(|old| old.due = due);
        self.files.push(file);
        Ok(())
    }

    fn forget(&mut self, which: impl Fn(&File) -> bool) {
        let Some(spec) = &self.spec else { return };
        self.files.retain(|file| {
            if which(file) {
                for kind in ["kv", "note"] {
                    std::fs::remove_file(spec.folder.join(file.name(kind))).ok();
                }
            }
            !which(file)
        });
    }

    fn write_note(&self, file: &File, saved: Option<&Saved>) -> std::io::Result<()> {
        let (Some(saved), Some(path)) = (saved, self.path(&file.name("note"))) else { return Ok(()) };
        let note = Note { tokens: saved.tokens.clone(), asked: saved.asked, grid_rows: saved.grid_rows };
        std::fs::write(path, serde_json::to_vec(&note)?)
    }

    fn read_note(&self, file: &File) -> Option<Saved> {
        let path = self.path(&file.name("note"))?;
        if std::fs::metadata(&path).ok()?.len() > NOTE_BYTES_MAX {
            return None;
        }
        let Note { tokens, asked, grid_rows } = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
        let fits = tokens.len() == file.rows as usize && grid_rows <= file.rows;
        fits.then_some(Saved { slot: file.slot, mark: file.mark, tokens, asked, grid_rows })
    }
}

#[cfg(test)]
mod tests {
    use capstan_engine::{StageError, StageOutput};
    use capstan_proto::Epoch;
    use capstan_proto::data::Payload;

    use super::*;

    /// Slots that hold so many rows each; a snapshot is a byte a row.
    #[derive(Default)]
    struct Slots(Vec<u32>);

    impl Stage for Slots {
        fn forward(&mut self, _: &MicroBatch) -> Result<StageOutput, StageError> {
            Ok(StageOutput::Logits(Vec::new()))
        }

        fn reset(&mut self, _: Epoch) -> Result<(), StageError> {
            self.0.fill(0);
            Ok(())
        }
    }

    impl Keeps for Slots {
        fn snapshot_bytes(&mut self, slot: u32) -> Result<u64, String> {
            Ok(self.0[slot as usize].into())
        }

        fn save(&mut self, slot: u32, path: &Path) -> Result<(u64, u32), String> {
            let rows = self.0[slot as usize];
            std::fs::write(path, vec![7; rows as usize]).map_err(|e| e.to_string())?;
            Ok((rows.into(), rows))
        }

        fn restore(&mut self, slot: u32, path: &Path, rows: u32) -> Result<(), String> {
            let bytes = std::fs::read(path).map_err(|e| e.to_string())?;
            if bytes.len() != rows as usize {
                return Err("it is cut off".into());
            }
            self.0[slot as usize] = rows;
            Ok(())
        }
    }

    const STAGES: u16 = 3;

    fn open(folder: &Path, bytes_max: u64) -> Snapshots {
        Snapshots::open(Some(SnapshotSpec { folder: folder.to_owned(), bytes_max }), STAGES)
    }

    fn batch(step: u64, op: KvOp) -> MicroBatch {
        MicroBatch { epoch: Epoch(1), step, ops: vec![op], rows: Vec::new(), payload: Payload::Hidden(Vec::new()) }
    }

    fn saved(slot: u32, mark: u64, rows: u32) -> Saved {
        Saved { slot, mark, tokens: (0..rows as i32).collect(), asked: 3, grid_rows: 2 }
    }

    /// Saves a slot as the driver does, at this step.
    fn save(of: &mut Snapshots, stage: &mut Slots, step: u64, slot: u32, mark: u64) -> Saved {
        let saved = saved(slot, mark, stage.0[slot as usize]);
        of.after(stage, &batch(step, KvOp::Save { slot, mark }), Some(&saved));
        saved
    }

    /// Whether a snapshot can be restored.
    fn restores(of: &mut Snapshots, slot: u32, mark: u64) -> Option<u32> {
        let mut stage = Slots(vec![0; 4]);
        let mut batch = batch(0, KvOp::Restore { slot, mark });
        of.before(&mut stage, &mut batch);
        let restored = batch.ops == [KvOp::Restore { slot, mark }];
        assert!(restored || batch.ops == [KvOp::Clear { slot }]);
        assert_eq!(Snapshots::restored(&batch), if restored { vec![slot] } else { vec![] });
        restored.then_some(stage.0[slot as usize])
    }

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn the_next_process_finds_what_the_last_one_saved() {
        let dir = tempfile::tempdir().unwrap();
        let mut stage = Slots(vec![40, 0, 9, 0]);
        let mut first = open(dir.path(), 1000);
        let of_0 = save(&mut first, &mut stage, 0, 0, 1 << 32);
        // A stage that is no driver knows no tokens.
        first.after(&mut stage, &batch(1, KvOp::Save { slot: 2, mark: 5 }), None);
        drop(first);
        // Killed while it wrote.
        std::fs::write(dir.path().join(PART), "half").unwrap();
        let mut second = open(dir.path(), 1000);
        assert_eq!(second.kept(), [of_0]);
        assert_eq!((restores(&mut second, 0, 1 << 32), restores(&mut second, 2, 5)), (Some(40), Some(9)));
        assert_eq!((restores(&mut second, 0, 5), restores(&mut second, 1, 5)), (None, None));
        assert_eq!(
            names(dir.path()),
            ["0-0000000100000000-40.kv", "0-0000000100000000-40.note", "2-0000000000000005-9.kv"]
        );
    }

    #[test]
    fn one_that_cannot_be_read_is_not_tried_twice() {
        let dir = tempfile::tempdir().unwrap();
        let mut stage = Slots(vec![40]);
        let mut of = open(dir.path(), 1000);
        save(&mut of, &mut stage, 0, 0, 1);
        std::fs::write(dir.path().join("0-0000000000000001-40.kv"), "cut off").unwrap();
        assert_eq!(restores(&mut of, 0, 1), None);
        assert!(of.kept().is_empty() && open(dir.path(), 1000).kept().is_empty());
        // One whose process ended over it is left behind under this name.
        save(&mut of, &mut stage, 1, 0, 2);
        std::fs::rename(dir.path().join("0-0000000000000002-40.kv"), dir.path().join(TRIED)).unwrap();
        assert_eq!(restores(&mut open(dir.path(), 1000), 0, 2), None);
        // Names and notes that say nothing sensible are nobody's.
        for name in ["x.kv", "0-1-2.kv", "1--3.kv", "0-0000000000000003-4-5.kv"] {
            std::fs::write(dir.path().join(name), "1234").unwrap();
        }
        std::fs::write(dir.path().join("3-0000000000000009-2.kv"), "12").unwrap();
        std::fs::write(dir.path().join("3-0000000000000009-2.note"), r#"{"tokens":[1],"asked":1,"grid_rows":0}"#)
            .unwrap();
        assert_eq!(open(dir.path(), 1000).kept(), []);
    }

    #[test]
    fn the_one_before_stays_until_every_stage_has_saved_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let mut stage = Slots(vec![40, 40]);
        let mut of = open(dir.path(), 1000);
        save(&mut of, &mut stage, 0, 0, 1);
        save(&mut of, &mut stage, 5, 0, 2);
        let round = u64::from(in_flight_max(STAGES));
        of.after(&mut stage, &batch(5 + round - 1, KvOp::Clear { slot: 1 }), None);
        assert_eq!((restores(&mut of, 0, 1), restores(&mut of, 0, 2)), (Some(40), Some(40)));
        of.after(&mut stage, &batch(5 + round, KvOp::Clear { slot: 1 }), None);
        assert_eq!((restores(&mut of, 0, 1), restores(&mut of, 0, 2)), (None, Some(40)));
        // Steps of another epoch say nothing about these.
        save(&mut of, &mut stage, 20, 0, 3);
        of.reset();
        of.after(&mut stage, &batch(100, KvOp::Clear { slot: 1 }), None);
        assert_eq!((restores(&mut of, 0, 2), restores(&mut of, 0, 3)), (Some(40), Some(40)));
    }

    #[test]
    fn memory_is_bounded_and_the_oldest_gives_way() {
        let dir = tempfile::tempdir().unwrap();
        let mut stage = Slots(vec![40, 30, 20, 200]);
        let mut of = open(dir.path(), 100);
        for (step, slot, mark) in [(0, 0, 1), (1, 1, 2), (2, 2, 3)] {
            save(&mut of, &mut stage, step, slot, mark);
        }
        save(&mut of, &mut stage, 3, 3, 4);
        assert_eq!(of.kept().len(), 3, "what is larger than all makes no room");
        stage.0[3] = 25;
        save(&mut of, &mut stage, 4, 3, 5);
        let marks: Vec<u64> = of.kept().iter().map(|saved| saved.mark).collect();
        assert_eq!(marks, [2, 3, 5]);
        let mut kept: Vec<String> = names(dir.path());
        kept.retain(|name| name.ends_with(".kv"));
        let bytes = kept.iter().map(|name| std::fs::metadata(dir.path().join(name)).unwrap().len());
        assert!(bytes.sum::<u64>() <= 100);
        // Without a folder nothing is kept, and nothing breaks.
        let mut none = Snapshots::open(None, STAGES);
        save(&mut none, &mut stage, 0, 0, 1);
        assert_eq!((none.are_kept(), restores(&mut none, 0, 1)), (false, None));
    }
}
