//! A disk in memory that may lose power: what was not synced may be there afterwards, or not, or in parts.
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use redb::StorageBackend;

use crate::dice::Dice;

/// What reaches a disk as a whole, in bytes.
const SECTOR: usize = 512;

#[derive(Debug)]
struct Written {
    at: usize,
    old: Vec<u8>,
    new: Vec<u8>,
}

#[derive(Debug, Default)]
struct Inner {
    bytes: Vec<u8>,
    /// Writes since the last sync, oldest first.
    unsynced: Vec<Written>,
    /// Counts power cycles: a handle of an earlier one is dead.
    life: u64,
    /// What was there when the power was last switched on, for a disk that lies.
    at_start: Option<Vec<u8>>,
}

/// A disk.
#[derive(Clone, Debug, Default)]
pub struct Disk {
    inner: Arc<Mutex<Inner>>,
    lies: bool,
}

/// A disk as a process has it open.
#[derive(Debug)]
pub struct Handle {
    inner: Arc<Mutex<Inner>>,
    life: u64,
}

impl Disk {
    /// A new one; one that `lies` loses everything since it was switched on, synced or not.
    pub fn new(lies: bool) -> Self {
        Self { lies, ..Self::default() }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens it for a process.
    pub fn open(&self) -> Handle {
        let mut inner = self.inner();
        inner.life += 1;
        if self.lies && !inner.bytes.is_empty() {
            inner.at_start = Some(inner.bytes.clone());
        }
        Handle { inner: self.inner.clone(), life: inner.life }
    }

    /// Cuts the power: each sector written since the last sync is there or not, as chance has it.
    pub fn lose_power(&self, dice: &mut Dice) {
        let mut inner = self.inner();
        inner.life += 1;
        let unsynced = std::mem::take(&mut inner.unsynced);
        for w in unsynced.iter().rev() {
            inner.bytes[w.at..w.at + w.old.len()].copy_from_slice(&w.old);
        }
        let kept = dice.unit();
        for w in &unsynced {
            for (i, sector) in w.new.chunks(SECTOR).enumerate() {
                if dice.chance(kept) {
                    let at = w.at + i * SECTOR;
                    inner.bytes[at..at + sector.len()].copy_from_slice(sector);
                }
            }
        }
        if let Some(before) = inner.at_start.take() {
            inner.bytes = before;
        }
    }
}

impl Handle {
    fn alive(&self) -> io::Result<MutexGuard<'_, Inner>> {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if inner.life == self.life { Ok(inner) } else { Err(io::Error::other("the power is off")) }
    }
}

impl StorageBackend for Handle {
    fn len(&self) -> io::Result<u64> {
        Ok(self.alive()?.bytes.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let inner = self.alive()?;
        let at = offset as usize;
        let from = inner.bytes.get(at..at + out.len()).ok_or_else(|| io::Error::other("beyond the end"))?;
        out.copy_from_slice(from);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut inner = self.alive()?;
        let len = len as usize;
        if len < inner.bytes.len() {
            // Nothing says which of the writes before reached the part that stays; a file system orders this with them.
            inner.unsynced.clear();
        }
        // A longer file is longer after a crash as well, with zeros.
        inner.bytes.resize(len, 0);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.alive()?.unsynced.clear();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut inner = self.alive()?;
        let at = offset as usize;
        let place = inner.bytes.get_mut(at..at + data.len()).ok_or_else(|| io::Error::other("beyond the end"))?;
        let old = place.to_vec();
        place.copy_from_slice(data);
        inner.unsynced.push(Written { at, old, new: data.to_vec() });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_synced_stays_and_old_handles_are_dead() {
        let disk = Disk::new(false);
        let handle = disk.open();
        handle.set_len(4096).unwrap();
        handle.write(0, &[1; 1024]).unwrap();
        handle.sync_data().unwrap();
        handle.write(512, &[2; 1024]).unwrap();
        disk.lose_power(&mut Dice::new(1));
        assert!(handle.write(0, &[3]).is_err());
        let again = disk.open();
        let mut out = [0; 2048];
        again.read(0, &mut out).unwrap();
        assert!(out[..512].iter().all(|b| *b == 1));
        for sector in [&out[512..1024], &out[1024..1536]] {
            assert!(sector.iter().all(|b| *b == sector[0]), "a sector is there whole or not at all");
        }
    }
}
