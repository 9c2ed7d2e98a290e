//! Length-prefixed postcard frames: four bytes of little-endian length, then the message.
use serde::{Serialize, de::DeserializeOwned};

/// Why bytes are not a message.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// The length prefix exceeds the limit; nothing was allocated.
    #[error(
        "a message of {len} bytes exceeds the limit of {max}; the peer is broken or hostile, the connection is closed"
    )]
    TooLarge {
        /// Announced length in bytes.
        len: usize,
        /// The limit in bytes.
        max: usize,
    },
    /// The bytes do not decode as the expected message.
    #[error("a message could not be decoded ({0}); do both sides run the same version of capstan?")]
    Malformed(String),
}

/// Bytes of a length prefix.
pub const PREFIX: usize = 4;

/// A message with its length prefix, or an error when it is larger than `max`.
pub fn encode<T: Serialize + ?Sized>(message: &T, max: usize) -> Result<Vec<u8>, CodecError> {
    let mut out = postcard::to_extend(message, vec![0; PREFIX]).map_err(|e| CodecError::Malformed(e.to_string()))?;
    let len = out.len() - PREFIX;
    if len > max {
        return Err(CodecError::TooLarge { len, max });
    }
    out[..PREFIX].copy_from_slice(&(len as u32).to_le_bytes());
    Ok(out)
}

/// The length that a prefix announces, refused before anything is allocated for it.
pub fn frame_len(prefix: [u8; PREFIX], max: usize) -> Result<usize, CodecError> {
    let len = u32::from_le_bytes(prefix) as usize;
    if len > max { Err(CodecError::TooLarge { len, max }) } else { Ok(len) }
}

/// The message in a frame's body (without the prefix). Trailing bytes are an error.
pub fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, CodecError> {
    let (message, rest) = postcard::take_from_bytes(body).map_err(|e| CodecError::Malformed(e.to_string()))?;
    if rest.is_empty() { Ok(message) } else { Err(CodecError::Malformed(format!("{} bytes too many", rest.len()))) }
}

/// The number of the variant that a message of an enum begins with; none when it is cut off or no number.
///
/// It tells a message that a newer build sent, whose number is too high, from one that is broken.
pub fn kind(body: &[u8]) -> Option<u32> {
    postcard::take_from_bytes::<u32>(body).ok().map(|(kind, _)| kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip_and_limits() {
        let frame = encode(&("abc", 7u32), 64).unwrap();
        let len = frame_len(frame[..4].try_into().unwrap(), 64).unwrap();
        assert_eq!(decode::<(String, u32)>(&frame[4..4 + len]).unwrap(), ("abc".into(), 7));
        assert!(encode(&[0u8; 65][..], 64).is_err());
        assert!(frame_len(u32::MAX.to_le_bytes(), 64).is_err());
        assert!(decode::<(String, u32)>(&[frame[4..].to_vec(), vec![0]].concat()).is_err());
    }
}
