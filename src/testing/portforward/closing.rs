//! How a forwarded connection's two streams end: the operations a runtime makes, in its order.

use crate::testing::ContainerRuntime;

/// What became of a forwarded connection.
#[derive(Debug)]
pub(super) enum End {
    /// Either side closed it.
    Clean,
    /// The application reset it.
    Reset(String),
    /// It never came about: nobody listens, or there is no sandbox to look in.
    Failed(String),
}

impl End {
    /// The text for the error stream.
    pub(super) fn text(&self) -> Option<&str> {
        match self {
            Self::Clean => None,
            Self::Reset(text) | Self::Failed(text) => Some(text),
        }
    }
}

/// An operation on one of the streams. A stream that has been closed is reset without a frame, but nevertheless lets go of
/// the DATA it has not delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// FIN on the data stream.
    CloseData,
    /// RST_STREAM on the data stream.
    ResetData,
    /// The text on the error stream.
    Text,
    /// FIN on the error stream.
    CloseError,
    /// RST_STREAM on the error stream.
    ResetError,
}

/// The operations that end a connection; the orders are those seen on the wire, see [`ContainerRuntime`].
pub(super) fn steps(runtime: ContainerRuntime, end: &End) -> &'static [Step] {
    use ContainerRuntime::{Containerd16, Containerd17, Containerd21, CriO, Kwok, Old};
    use Step::{CloseData, CloseError, ResetData, ResetError, Text};
    match (runtime, end) {
        (_, End::Clean) if fastrand::bool() => &[CloseData, CloseError],
        (_, End::Clean) => &[CloseError, CloseData],
        (Old, _) => &[Text, CloseError, CloseData],
        (CriO, _) => &[Text, ResetData, ResetError],
        (Containerd17, End::Reset(_)) => &[CloseData, ResetData, ResetError],
        (Containerd16 | Containerd17, _) => &[CloseData, Text, CloseError],
        (Containerd21, End::Reset(_)) => &[Text, ResetError, CloseData, ResetData],
        (Containerd21 | Kwok, _) => &[CloseData, Text, ResetData, ResetError],
    }
}
