//! This machine's memory and devices, and what stages here have reserved of it.
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use capstan_proto::child::StageInfo;
use capstan_proto::device::DeviceProfile;
use capstan_proto::manage::DeviceStatus;
use sysinfo::{MemoryRefreshKind, RefreshKind, System};

/// Memory that is never given to stages, in bytes: the daemon, the page cache of shards being written, the user.
const KEPT_FREE: u64 = 256 << 20;

#[derive(Clone, Copy)]
struct Taken {
    /// Not visible as used memory yet, or never, in bytes: weights that are mapped count as free to the system.
    unseen: u64,
    /// All of it, in bytes.
    total: u64,
}

/// This machine.
pub(crate) struct Machine {
    limit_bytes: Option<u64>,
    gpu: bool,
    system: Mutex<System>,
    taken: Mutex<HashMap<u64, Taken>>,
    next: AtomicU64,
    devices: Mutex<Vec<DeviceStatus>>,
    profile: Mutex<Option<DeviceProfile>>,
}

/// Memory that a stage holds until this is dropped.
pub(crate) struct Reservation {
    machine: Arc<Machine>,
    key: u64,
}

impl Machine {
    pub(crate) fn new(limit_bytes: Option<u64>, gpu_layers: i32) -> Self {
        let system = System::new_with_specifics(RefreshKind::nothing().with_memory(MemoryRefreshKind::everything()));
        Self {
            limit_bytes,
            gpu: gpu_layers != 0,
            system: Mutex::new(system),
            taken: Mutex::default(),
            next: AtomicU64::new(0),
            devices: Mutex::default(),
            profile: Mutex::default(),
        }
    }

    fn taken(&self) -> MutexGuard<'_, HashMap<u64, Taken>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set_devices(&self, devices: Vec<DeviceStatus>) {
        *self.devices.lock().unwrap_or_else(PoisonError::into_inner) = devices;
    }

    pub(crate) fn devices(&self) -> Vec<DeviceStatus> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn set_profile(&self, profile: DeviceProfile) {
        *self.profile.lock().unwrap_or_else(PoisonError::into_inner) = Some(profile);
    }

    /// What was measured of this machine.
    pub(crate) fn profile(&self) -> Option<DeviceProfile> {
        self.profile.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether stages are here, or are about to be.
    pub(crate) fn is_busy(&self) -> bool {
        !self.taken().is_empty()
    }

    /// Memory in all and free for stages, in bytes.
    pub(crate) fn memory(&self) -> (u64, u64) {
        let (mut total, mut available) = self.of_system();
        let taken = self.taken();
        let sum = |of: fn(&Taken) -> u64| taken.values().map(of).fold(0u64, u64::saturating_add);
        let discrete: Vec<_> = if self.gpu { self.devices() } else { vec![] };
        let discrete: Vec<_> = discrete.iter().filter(|d| d.kind == "gpu").collect();
        if !discrete.is_empty() {
            // With every layer on graphics cards it is their memory that counts. They were asked at the start, so
            // everything taken since is subtracted.
            total = discrete.iter().map(|d| d.memory_total_bytes).sum();
            available = discrete.iter().map(|d| d.memory_free_bytes).sum::<u64>().saturating_sub(sum(|t| t.total));
        } else {
            available = available.saturating_sub(sum(|t| t.unseen)).saturating_sub(KEPT_FREE);
        }
        if let Some(limit) = self.limit_bytes {
            available = available.min(limit.saturating_sub(sum(|t| t.total)));
        }
        (total, available)
    }

    /// The system's memory, in all and free, in bytes.
    fn of_system(&self) -> (u64, u64) {
        let mut system = self.system.lock().unwrap_or_else(PoisonError::into_inner);
        system.refresh_memory();
        // A container may have less than its machine.
        match system.cgroup_limits() {
            Some(c) => {
                // The container's free memory leaves the page cache out, which gives way: what counts is anonymous.
                let free = c.total_memory.saturating_sub(c.rss);
                (system.total_memory().min(c.total_memory), system.available_memory().min(free))
            }
            None => (system.total_memory(), system.available_memory()),
        }
    }

    /// What of the system's memory no stage needs, in bytes; a graphics card's is none of it.
    pub(crate) fn spare_bytes(&self) -> u64 {
        let free = if self.gpu { self.of_system().1.saturating_sub(KEPT_FREE) } else { u64::MAX };
        free.min(self.memory().1)
    }

    /// Sets memory aside for a stage; when there is not enough, the bytes that are free.
    pub(crate) fn reserve(self: &Arc<Self>, bytes: u64) -> Result<Reservation, u64> {
        let (_, free) = self.memory();
        if bytes > free {
            return Err(free);
        }
        let key = self.next.fetch_add(1, Ordering::Relaxed);
        self.taken().insert(key, Taken { unseen: bytes, total: bytes });
        Ok(Reservation { machine: self.clone(), key })
    }
}

impl Reservation {
    /// Replaces the estimate by what the loaded stage measures; a draft model beside it is not in that.
    pub(crate) fn measured(&self, info: &StageInfo, draft_bytes: u64) {
        let unseen = info.weights_bytes.saturating_add(draft_bytes);
        let total = unseen.saturating_add(info.kv_bytes).saturating_add(info.compute_bytes);
        self.machine.taken().insert(self.key, Taken { unseen, total });
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.machine.taken().remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reservations_count_against_the_limit_and_are_given_back() {
        let machine = Arc::new(Machine::new(Some(1000), 0));
        let free = machine.memory().1;
        assert!(free <= 1000);
        let first = machine.reserve(free).expect("it was free");
        assert_eq!(machine.reserve(1).err(), Some(0));
        first.measured(&StageInfo { weights_bytes: 1, ..StageInfo::default() }, 2);
        assert_eq!(machine.memory().1, free.min(997));
        drop(first);
        assert_eq!(machine.memory().1, free);
    }
}
