//! Which Linux this is, and so by which commands a program is installed and a kernel parameter is set.
use super::root::Root;

/// Distributions that are managed alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Debian, Ubuntu and what comes from them.
    Debian,
    /// Fedora and its relatives.
    Fedora,
    /// Arch and its relatives.
    Arch,
    /// Another, or not known.
    Other,
}

/// The system's name and boot parameters.
#[derive(Clone, Debug)]
pub struct System {
    /// How it is managed.
    pub family: Family,
    /// `ID` of `/etc/os-release`, such as `ubuntu`.
    pub id: String,
    /// `VERSION_ID`, such as `24.04`.
    pub version: String,
    /// What the kernel was started with.
    pub parameters: Vec<String>,
    has_grub: bool,
}

impl System {
    /// Reads it.
    pub fn read(root: &Root) -> Self {
        let release = root.text("/etc/os-release").or_else(|| root.text("/usr/lib/os-release")).unwrap_or_default();
        let id = field(&release, "ID").to_lowercase();
        let like = field(&release, "ID_LIKE").to_lowercase();
        let is = |names: &[&str]| names.iter().any(|n| id == *n || like.split_whitespace().any(|l| l == *n));
        let family = if is(&["debian", "ubuntu"]) {
            Family::Debian
        } else if is(&["fedora", "rhel", "centos"]) {
            Family::Fedora
        } else if is(&["arch"]) {
            Family::Arch
        } else {
            Family::Other
        };
        let cmdline = root.text("/proc/cmdline").unwrap_or_default();
        Self {
            family,
            version: field(&release, "VERSION_ID").to_owned(),
            parameters: cmdline.split_whitespace().map(str::to_owned).collect(),
            has_grub: root.exists("/etc/default/grub"),
            id,
        }
    }

    /// The value of a kernel parameter; the last one counts.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.iter().rev().find_map(|p| p.strip_prefix(name)?.strip_prefix('='))
    }

    /// The commands that start the kernel with more parameters; none when it is not known how this boot loader is told.
    pub fn set_parameters(&self, parameters: &str) -> Vec<String> {
        let edit = format!(r#"sudo sed -i 's/^GRUB_CMDLINE_LINUX_DEFAULT="/&{parameters} /' /etc/default/grub"#);
        let write = match self.family {
            Family::Fedora => {
                return vec![format!("sudo grubby --update-kernel=ALL --args=\"{parameters}\""), reboot()];
            }
            _ if !self.has_grub => return vec![],
            Family::Debian => "sudo update-grub",
            Family::Arch | Family::Other => "sudo grub-mkconfig -o /boot/grub/grub.cfg",
        };
        vec![edit, write.into(), reboot()]
    }

    /// The command that installs a package of the distribution; none when it is not known.
    pub fn install(&self, package: &str) -> Option<String> {
        match self.family {
            Family::Debian => Some(format!("sudo apt install {package}")),
            Family::Fedora => Some(format!("sudo dnf install {package}")),
            Family::Arch => Some(format!("sudo pacman -S {package}")),
            Family::Other => None,
        }
    }
}

/// The command that starts the machine anew.
pub fn reboot() -> String {
    "sudo reboot".into()
}

/// Whether a name from the system may stand in a command as it is.
pub fn is_plain_word(name: &str) -> bool {
    !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || "._-:@".contains(c))
}

fn field<'a>(release: &'a str, name: &str) -> &'a str {
    let value = release.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix('='));
    value.unwrap_or_default().trim().trim_matches(['"', '\''])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn system(release: &str, grub: bool) -> System {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("etc/default")).unwrap();
        std::fs::create_dir(dir.path().join("proc")).unwrap();
        std::fs::write(dir.path().join("etc/os-release"), release).unwrap();
        std::fs::write(dir.path().join("proc/cmdline"), "quiet iommu=pt ttm.pages_limit=1 ttm.pages_limit=2\n")
            .unwrap();
        if grub {
            std::fs::write(dir.path().join("etc/default/grub"), "").unwrap();
        }
        System::read(&Root::new(dir.path().into()))
    }

    #[test]
    fn each_family_has_its_commands_and_an_unknown_one_none() {
        let mint = system("NAME=x\nID=linuxmint\nID_LIKE=\"ubuntu debian\"\nVERSION_ID=\"22\"", true);
        assert_eq!((mint.family, mint.version.as_str()), (Family::Debian, "22"));
        assert_eq!(mint.parameter("ttm.pages_limit"), Some("2"));
        assert_eq!((mint.parameter("ttm"), mint.parameter("quiet")), (None, None));
        let commands = mint.set_parameters("a.b=1");
        assert_eq!(commands[0], r#"sudo sed -i 's/^GRUB_CMDLINE_LINUX_DEFAULT="/&a.b=1 /' /etc/default/grub"#);
        assert_eq!(commands[1..], ["sudo update-grub", "sudo reboot"]);
        let fedora = system("ID=fedora", false);
        assert_eq!(fedora.set_parameters("a=1")[0], "sudo grubby --update-kernel=ALL --args=\"a=1\"");
        let other = system("ID=nixos", false);
        assert_eq!((other.set_parameters("a=1"), other.install("x")), (vec![], None));
    }

    #[test]
    fn names_that_a_shell_would_read_stay_out_of_commands() {
        assert!(is_plain_word("enp3s0") && is_plain_word("wlx0-a.1:2@3"));
        assert!(!is_plain_word("") && !is_plain_word("eth0;reboot") && !is_plain_word("$(x)") && !is_plain_word("a b"));
    }
}
