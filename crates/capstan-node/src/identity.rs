//! The node's key, and the folder it lives in.
use std::path::Path;

use iroh::SecretKey;

use crate::error::NodeError;
use crate::files;

/// Makes the data folder, for its user only.
pub(crate) fn make_data_dir(path: &Path) -> Result<(), NodeError> {
    let io = |source| NodeError::DataDir { path: path.to_owned(), source };
    std::fs::create_dir_all(path).map_err(io)?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700)).map_err(io)?;
    }
    Ok(())
}

/// The key from `node.key`, made the first time.
pub(crate) fn load_key(data_dir: &Path) -> Result<SecretKey, NodeError> {
    let path = data_dir.join("node.key");
    if let Some(text) = files::read(&path)? {
        let mut key = [0; 32];
        let text = String::from_utf8_lossy(&text);
        // The error must not repeat what the file holds.
        hex::decode_to_slice(text.trim(), &mut key)
            .map_err(|_| NodeError::Damaged { path: path.clone(), reason: "it holds no key".into() })?;
        return Ok(SecretKey::from_bytes(&key));
    }
    let key = SecretKey::generate();
    files::write_private(&path, hex::encode(key.to_bytes()).as_bytes())
        .map_err(|source| NodeError::DataDir { path, source })?;
    Ok(key)
}

/// The machine's name as a node's name: what a member list refuses is left out.
pub(crate) fn machine_name() -> String {
    let name = sysinfo::System::host_name().unwrap_or_default();
    let name: String =
        name.chars().filter(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_')).take(40).collect();
    if name.is_empty() { "node".into() } else { name }
}
