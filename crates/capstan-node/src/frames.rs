//! Messages on a QUIC stream, with the codec's limits.
use capstan_proto::codec::{self, CodecError};
use iroh::endpoint::{ReadExactError, RecvStream, SendStream};
use serde::{Serialize, de::DeserializeOwned};

/// Bytes that are sent or skipped at a time.
const PIECE_BYTES: usize = 16 << 10;

/// Why a message did not go or come.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FrameError {
    /// The stream is broken, reset, or ended inside a message.
    #[error("{0}")]
    Stream(String),
    /// The bytes are no message.
    #[error(transparent)]
    Codec(#[from] CodecError),
}

/// Writes a message of at most `max` bytes.
pub(crate) async fn write<T: Serialize>(stream: &mut SendStream, message: &T, max: usize) -> Result<(), FrameError> {
    let frame = codec::encode(message, max)?;
    stream.write_all(&frame).await.map_err(|e| FrameError::Stream(e.to_string()))
}

/// Reads a message of at most `max` bytes; none when the stream was finished before it. Not safe to cancel and go on.
pub(crate) async fn read<T: DeserializeOwned>(stream: &mut RecvStream, max: usize) -> Result<Option<T>, FrameError> {
    let mut prefix = [0; codec::PREFIX];
    match stream.read_exact(&mut prefix).await {
        Ok(()) => {}
        Err(ReadExactError::FinishedEarly(0)) => return Ok(None),
        Err(e) => return Err(FrameError::Stream(e.to_string())),
    }
    let mut body = vec![0; codec::frame_len(prefix, max)?];
    stream.read_exact(&mut body).await.map_err(|e| FrameError::Stream(e.to_string()))?;
    Ok(Some(codec::decode(&body)?))
}

/// Sends so many zeros, to measure a link. They are encrypted, so nothing on the way can make them fewer.
pub(crate) async fn write_zeros(stream: &mut SendStream, bytes: u32) -> Result<(), FrameError> {
    let piece = [0; PIECE_BYTES];
    let mut left = bytes as usize;
    while left > 0 {
        let now = left.min(PIECE_BYTES);
        stream.write_all(&piece[..now]).await.map_err(|e| FrameError::Stream(e.to_string()))?;
        left -= now;
    }
    Ok(())
}

/// Reads so many bytes and forgets them.
pub(crate) async fn skip(stream: &mut RecvStream, bytes: u32) -> Result<(), FrameError> {
    let mut piece = vec![0; PIECE_BYTES];
    let mut left = bytes as usize;
    while left > 0 {
        let now = left.min(PIECE_BYTES);
        stream.read_exact(&mut piece[..now]).await.map_err(|e| FrameError::Stream(e.to_string()))?;
        left -= now;
    }
    Ok(())
}

/// Reads a message that must come.
pub(crate) async fn expect<T: DeserializeOwned>(stream: &mut RecvStream, max: usize) -> Result<T, FrameError> {
    read(stream, max).await?.ok_or_else(|| FrameError::Stream("the stream ended before an answer".into()))
}
