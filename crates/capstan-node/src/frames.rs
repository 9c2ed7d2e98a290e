//! Messages on a QUIC stream, with the codec's limits.
use capstan_proto::codec::{self, CodecError};
use capstan_proto::control::{RESET_BAD_REQUEST, RESET_NOT_UNDERSTOOD};
use iroh::endpoint::{ReadError, ReadExactError, RecvStream, SendStream, VarInt};
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
    /// A message of a kind that only a newer build knows: the other side's, or ours, whichever reads it.
    #[error("the request is of a kind that is not known here")]
    NotUnderstood,
}

impl From<ReadExactError> for FrameError {
    fn from(error: ReadExactError) -> Self {
        match error {
            ReadExactError::ReadError(ReadError::Reset(code)) if code == VarInt::from_u32(RESET_NOT_UNDERSTOOD) => {
                Self::NotUnderstood
            }
            other => Self::Stream(other.to_string()),
        }
    }
}

/// Writes a message of at most `max` bytes.
pub(crate) async fn write<T: Serialize>(stream: &mut SendStream, message: &T, max: usize) -> Result<(), FrameError> {
    let frame = codec::encode(message, max)?;
    stream.write_all(&frame).await.map_err(|e| FrameError::Stream(e.to_string()))
}

/// Reads a message of at most `max` bytes; none when the stream was finished before it. Not safe to cancel and go on.
pub(crate) async fn read<T: DeserializeOwned>(stream: &mut RecvStream, max: usize) -> Result<Option<T>, FrameError> {
    let Some(body) = body(stream, max).await? else { return Ok(None) };
    Ok(Some(codec::decode(&body)?))
}

/// The body of the next message; none when the stream was finished before it.
async fn body(stream: &mut RecvStream, max: usize) -> Result<Option<Vec<u8>>, FrameError> {
    let mut prefix = [0; codec::PREFIX];
    match stream.read_exact(&mut prefix).await {
        Ok(()) => {}
        Err(ReadExactError::FinishedEarly(0)) => return Ok(None),
        Err(e) => return Err(e.into()),
    }
    let mut body = vec![0; codec::frame_len(prefix, max)?];
    stream.read_exact(&mut body).await?;
    Ok(Some(body))
}

/// Reads a request that must come. A kind from `kinds` on is not understood, which is no fault of the sender's.
pub(crate) async fn expect_kind<T: DeserializeOwned>(
    stream: &mut RecvStream,
    max: usize,
    kinds: u32,
) -> Result<T, FrameError> {
    let body = body(stream, max).await?.ok_or_else(|| FrameError::Stream("the stream ended early".into()))?;
    match codec::decode(&body) {
        Err(_) if codec::kind(&body).is_some_and(|kind| kind >= kinds) => Err(FrameError::NotUnderstood),
        decoded => Ok(decoded?),
    }
}

/// Tells the other side, by the code of a reset, why its request is not answered. The connection goes on.
pub(crate) fn refuse(send: &mut SendStream, recv: &mut RecvStream, error: &FrameError) {
    let code = VarInt::from_u32(match error {
        FrameError::NotUnderstood => RESET_NOT_UNDERSTOOD,
        FrameError::Codec(_) | FrameError::Stream(_) => RESET_BAD_REQUEST,
    });
    // These fail only where the stream has ended already.
    send.reset(code).ok();
    recv.stop(code).ok();
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
