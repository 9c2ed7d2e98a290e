//! The disk below the data folder: what it is, how much room it has, and how fast it reads and writes.
//!
//! Speed is measured with a file that never has a name, so nothing is left behind however this process ends.
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::finding::{Check, Finding, State};
use super::network::rate;
use super::root::{self, Root};
use crate::view;

/// Most that is written and read back, in bytes: enough to get past a disk's own cache of some dozen MB.
const TRIAL_BYTES: u64 = 256 << 20;
/// How long writing, and how long reading, may take before no more is begun.
const TRIAL_TIME: Duration = Duration::from_secs(1);
/// Written before the disk is waited for, in bytes. Waiting is what makes the figure the disk's and not the cache's; on
/// the slowest disk that is worth using one such piece takes a second.
const PIECE_BYTES: usize = 32 << 20;
/// Read at once, in bytes.
const READ_BYTES: usize = 4 << 20;
/// Room that must stay free for the trial, in bytes.
const TRIAL_ROOM: u64 = 4 * TRIAL_BYTES;

/// Room below which no shard of a model worth splitting fits, in bytes.
const ROOM_MIN: u64 = 10 << 30;
/// Room for a quarter of Kimi K2.5 at 2.9 bits (94 GB) and some more, in bytes.
const ROOM_ENOUGH: u64 = 128 << 30;
/// Reading below this takes more than five minutes for 100 GB of weights, in bytes per second.
const READ_ENOUGH: f64 = 333e6;

const BLOCK: &str = "https://www.kernel.org/doc/Documentation/ABI/stable/sysfs-block";

/// The file system below a folder, as the kernel's list of mounts has it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mount {
    kind: String,
    /// What is mounted, such as `/dev/nvme0n1p2`.
    what: String,
    /// Major and minor number of the device, such as `259:2`.
    device: String,
}

impl Mount {
    fn find(mountinfo: &str, folder: &Path) -> Option<Self> {
        let mount = |line: &str| {
            let (left, right) = line.split_once(" - ")?;
            let (left, right): (Vec<&str>, Vec<&str>) = (left.split(' ').collect(), right.split(' ').collect());
            let place = PathBuf::from(unescape(left.get(4)?));
            let this = Self {
                kind: (*right.first()?).to_owned(),
                what: unescape(right.get(1)?),
                device: (*left.get(2)?).to_owned(),
            };
            folder.starts_with(&place).then(|| (place.components().count(), this))
        };
        // Of mounts at the same place the last one is on top.
        mountinfo.lines().filter_map(mount).max_by_key(|(depth, _)| *depth).map(|(_, mount)| mount)
    }

    /// Whether it has heads that move; none when the system does not say.
    fn rotates(&self, root: &Root) -> Option<bool> {
        let name = self.what.strip_prefix("/dev/").filter(|n| !n.contains('/') && !n.contains(".."));
        let device = Some(&self.device).filter(|d| d.chars().all(|c| c.is_ascii_digit() || c == ':'));
        let folders = device.map(|d| format!("/sys/dev/block/{d}")).into_iter();
        let mut folders = folders.chain(name.map(|n| format!("/sys/class/block/{n}")));
        // A partition's queue is its disk's, one folder up.
        folders.find_map(|folder| {
            let of = |up: &str| root.number::<u8>(&format!("{folder}{up}/queue/rotational"));
            Some(of("").or_else(|| of("/.."))? == 1)
        })
    }

    fn finding(&self, folder: &Path, root: &Root) -> Finding {
        let check = Check::Disk;
        let found = format!("{} on {} ({})", folder.display(), self.what, self.kind);
        match self.kind.as_str() {
            "tmpfs" | "ramfs" => {
                return Finding::new(check, State::Warning, found)
                    .why("This folder is in memory: shards in it take what stages need, and a restart loses them.")
                    .mend(["capstan up --data-dir /FOLDER/ON/A/DISK"]);
            }
            "nfs" | "nfs4" | "cifs" | "smb3" | "9p" | "fuse.sshfs" => {
                return Finding::new(check, State::Warning, found)
                    .why("This folder is on another machine, so weights cross the network at every load.")
                    .mend(["capstan up --data-dir /FOLDER/ON/A/DISK"]);
            }
            _ => {}
        }
        if ["/dev/vd", "/dev/xvd"].iter().any(|disk| self.what.starts_with(disk)) {
            // They call themselves turning whatever is below.
            return Finding::unknown(check, format!("{found}; a virtual disk does not say what it lies on"))
                .source(BLOCK);
        }
        match self.rotates(root) {
            Some(true) => Finding::new(check, State::Warning, format!("{found}, a disk that turns"))
                .why(
                    "It reads 100 to 250 MB/s, so 100 GB of weights take about ten minutes; choose a folder on an SSD.",
                )
                .mend(["capstan up --data-dir /FOLDER/ON/AN/SSD"])
                .source(BLOCK),
            Some(false) => Finding::ok(check, format!("{found}, solid state")).source(BLOCK),
            None => Finding::unknown(check, format!("{found}; the system does not say what kind of disk that is"))
                .source(BLOCK),
        }
    }
}

/// A path of the list of mounts, in which spaces and the like are written as octal numbers.
fn unescape(text: &str) -> String {
    let mut out = vec![];
    let bytes = text.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        let octal = bytes[at..].strip_prefix(b"\\").and_then(|rest| rest.get(..3)).and_then(|digits| {
            digits.iter().try_fold(0u32, |n, d| (b'0'..=b'7').contains(d).then(|| n * 8 + u32::from(d - b'0')))
        });
        match octal.and_then(|n| u8::try_from(n).ok()) {
            Some(byte) => {
                out.push(byte);
                at += 4;
            }
            None => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// How fast a folder's disk was.
#[derive(Clone, Copy, Debug)]
struct Speed {
    write_bytes_per_s: f64,
    read_bytes_per_s: f64,
    bytes: u64,
    /// Whether reading had to ask the disk.
    from_disk: bool,
}

fn measure(folder: &Path) -> io::Result<Speed> {
    let mut file = tempfile::tempfile_in(folder)?;
    let (bytes, write_s) = write(&mut file)?;
    let from_disk = root::forget_cached(&file);
    file.seek(SeekFrom::Start(0))?;
    let (read, read_s) = read(&mut file)?;
    let per_s = |bytes: u64, s: f64| bytes as f64 / s.max(1e-6);
    Ok(Speed { write_bytes_per_s: per_s(bytes, write_s), read_bytes_per_s: per_s(read, read_s), bytes, from_disk })
}

fn write(file: &mut File) -> io::Result<(u64, f64)> {
    // Random, so that no file system stores less than it is given.
    let mut piece = vec![0; PIECE_BYTES];
    rand::fill(&mut piece[..]);
    let (start, mut written) = (Instant::now(), 0);
    while written < TRIAL_BYTES && (written == 0 || start.elapsed() < TRIAL_TIME) {
        file.write_all(&piece)?;
        file.sync_data()?;
        written += PIECE_BYTES as u64;
    }
    Ok((written, start.elapsed().as_secs_f64()))
}

fn read(file: &mut File) -> io::Result<(u64, f64)> {
    let mut buffer = vec![0; READ_BYTES];
    let (start, mut total) = (Instant::now(), 0);
    while start.elapsed() < TRIAL_TIME {
        match file.read(&mut buffer)? {
            0 => break,
            n => total += n as u64,
        }
    }
    Ok((total, start.elapsed().as_secs_f64()))
}

fn judge_speed(speed: Speed) -> Finding {
    let check = Check::DiskSpeed;
    let (write, read) = (rate(speed.write_bytes_per_s), rate(speed.read_bytes_per_s));
    let found =
        format!("writes {write}, reads {read} ({} in one piece, one after the other)", view::bytes(speed.bytes));
    if !speed.from_disk {
        return Finding::unknown(check, found).why(
            "This system could not be told to forget what it had in memory, so reading says nothing about the disk.",
        );
    }
    if speed.read_bytes_per_s < READ_ENOUGH {
        let minutes = 100e9 / speed.read_bytes_per_s.max(1.0) / 60.0;
        return Finding::new(check, State::Warning, found)
            .why(format!("100 GB of weights take {minutes:.0} minutes to load; an SSD on NVMe takes less than one."))
            .mend(["capstan up --data-dir /FOLDER/ON/AN/SSD"]);
    }
    Finding::ok(check, found)
}

fn judge_room(room: Option<(u64, u64)>) -> Finding {
    let check = Check::DiskSpace;
    let Some((free, total)) = room else {
        return Finding::unknown(check, "the system does not say how much room there is");
    };
    let found = format!("{} of {} free", view::bytes(free), view::bytes(total));
    let (state, why) = match free {
        ..ROOM_MIN => (State::Problem, "No shard of a model worth splitting fits."),
        ROOM_MIN..ROOM_ENOUGH => {
            (State::Warning, "A quarter of a model of a trillion parameters at 2.9 bits takes 94 GB.")
        }
        _ => return Finding::ok(check, found),
    };
    Finding::new(check, state, found).why(why).mend(["capstan up --data-dir /FOLDER/WITH/MORE/ROOM"])
}

/// The folder, or what of its path is there already: nothing is made.
fn nearest(folder: &Path) -> Option<&Path> {
    folder.ancestors().find(|p| p.is_dir())
}

/// All findings about the data folder's disk. The speed is measured only when `trial` says so.
pub async fn findings(root: &Root, data_dir: &Path, trial: bool) -> Vec<Finding> {
    let Some(folder) = nearest(data_dir) else {
        let found = format!("no part of {} is there", data_dir.display());
        return [Check::Disk, Check::DiskSpace, Check::DiskSpeed].map(|c| Finding::unknown(c, &found)).to_vec();
    };
    let mount = root.text("/proc/self/mountinfo").and_then(|text| Mount::find(&text, folder));
    let disk = mount.map_or_else(
        || Finding::unknown(Check::Disk, format!("{}; the system does not say what it lies on", folder.display())),
        |mount| mount.finding(folder, root),
    );
    let room = root::room(folder);
    let mut findings = vec![disk, judge_room(room)];
    if trial {
        findings.push(match room {
            Some((free, _)) if free < TRIAL_ROOM => Finding::unknown(Check::DiskSpeed, "too little room to measure it"),
            _ => {
                let folder = folder.to_path_buf();
                match tokio::task::spawn_blocking(move || measure(&folder)).await {
                    Ok(Ok(speed)) => judge_speed(speed),
                    Ok(Err(e)) => Finding::unknown(Check::DiskSpeed, format!("it could not be measured ({e})")),
                    Err(e) => Finding::unknown(Check::DiskSpeed, format!("it could not be measured ({e})")),
                }
            }
        });
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "22 1 259:2 / / rw,relatime shared:1 - ext4 /dev/nvme0n1p2 rw\n\
                          23 22 0:40 / /data\\040two rw - tmpfs tmpfs rw,size=1k\n\
                          24 22 8:1 / /data rw - ext4 /dev/sda1 rw";

    #[test]
    fn the_innermost_mount_counts() {
        let kind = |path: &str| Mount::find(MOUNTS, Path::new(path)).map(|m| (m.what, m.device));
        let is = |what: &str, device: &str| Some((what.to_owned(), device.to_owned()));
        assert_eq!(kind("/home/x"), is("/dev/nvme0n1p2", "259:2"));
        assert_eq!(kind("/data/x"), is("/dev/sda1", "8:1"));
        assert_eq!(kind("/data two/x"), is("tmpfs", "0:40"));
        for bad in ["", " - ", "a - b", "1 2 3 4 - x y\n\\\\\\", "1 2 3 4 / 6 - "] {
            assert!(Mount::find(bad, Path::new("/")).is_none_or(|m| m.kind.is_empty() || m.what.is_empty()), "{bad:?}");
        }
        assert_eq!((unescape("a\\040b\\"), unescape("\\999\\77")), ("a b\\".into(), "\\999\\77".into()));
    }

    #[test]
    fn a_partition_turns_when_its_disk_does() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(dir.path().into());
        let disk = dir.path().join("sys/dev/block/8:1");
        std::fs::create_dir_all(&disk).unwrap();
        std::fs::create_dir_all(dir.path().join("sys/dev/block/queue")).unwrap();
        std::fs::write(dir.path().join("sys/dev/block/queue/rotational"), "1\n").unwrap();
        let mount = Mount::find(MOUNTS, Path::new("/data")).unwrap();
        assert_eq!(mount.rotates(&root), Some(true));
        assert_eq!(mount.finding(Path::new("/data"), &root).state, State::Warning);
        let on_virtual = Mount { what: "/dev/vda1".into(), ..mount.clone() };
        assert_eq!(on_virtual.finding(Path::new("/data"), &root).state, State::Unknown);
        assert_eq!(Mount { device: "../..".into(), what: "/dev/../x".into(), ..mount }.rotates(&root), None);
    }

    #[test]
    fn a_trial_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let speed = measure(dir.path()).unwrap();
        assert!(speed.write_bytes_per_s > 0.0 && speed.read_bytes_per_s > 0.0);
        assert!((PIECE_BYTES as u64..=TRIAL_BYTES).contains(&speed.bytes));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn room_and_speed_have_their_limits() {
        let room = |free| judge_room(Some((free, u64::MAX))).state;
        assert_eq!((room(1 << 30), room(50 << 30), room(1 << 40)), (State::Problem, State::Warning, State::Ok));
        let speed = |read, from_disk| {
            judge_speed(Speed { write_bytes_per_s: 1e9, read_bytes_per_s: read, bytes: 1, from_disk }).state
        };
        assert_eq!(
            (speed(3e9, true), speed(1e8, true), speed(3e9, false)),
            (State::Ok, State::Warning, State::Unknown)
        );
    }
}
