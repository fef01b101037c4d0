//! The messages of `v4.channel.k8s.io`, for one port: the first byte of each is the number of its channel, and the first message
//! on each channel is the port (`cri-streaming:pkg/streaming/portforward/websocket.go`).

use std::mem;

/// The channels of the first port that was asked for: what its connection carries, and why it failed.
pub(super) const DATA: u8 = 0;
const ERROR: u8 = 1;

/// How long the greeting on each channel is: the port, little endian.
const GREETING: usize = 2;

/// How much is kept of why a connection failed.
const LONGEST_FAILURE: usize = 4 << 10;

/// Where in the messages the peer is.
#[derive(Debug)]
pub(super) struct Channels {
    /// The channel of the message that is coming; none before its first byte.
    current: Option<u8>,
    /// What is still to come of the greetings, by channel.
    greetings: [usize; 2],
    /// What has come on the error channel.
    failure: Vec<u8>,
}

impl Default for Channels {
    fn default() -> Self {
        Self {
            current: None,
            greetings: [GREETING; 2],
            failure: Vec::new(),
        }
    }
}

impl Channels {
    /// Begins a message.
    pub(super) fn begin(&mut self) {
        self.current = None;
    }

    /// Tells whether the next byte is the connection's.
    pub(super) fn is_data(&self) -> bool {
        self.current == Some(DATA) && self.greetings[usize::from(DATA)] == 0
    }

    /// Takes what is not the connection's off the front of a message, in one or several goes. Returns how much that was: none
    /// only of nothing. Fails for a channel that was not asked for.
    pub(super) fn take(&mut self, payload: &[u8]) -> Result<usize, &'static str> {
        let Some(&first) = payload.first() else {
            return Ok(0);
        };
        let Some(channel) = self.current else {
            if first > ERROR {
                return Err("the server sent on a channel that nobody asked for");
            }
            self.current = Some(first);
            return Ok(1);
        };
        let greeting = &mut self.greetings[usize::from(channel)];
        if *greeting > 0 {
            let taken = payload.len().min(*greeting);
            *greeting -= taken;
            return Ok(taken);
        }
        let room = LONGEST_FAILURE.saturating_sub(self.failure.len());
        self.failure.extend(payload.iter().take(room));
        Ok(payload.len())
    }

    /// Returns why the connection failed, once the whole message is there.
    pub(super) fn failure(&mut self) -> Option<String> {
        let failure = mem::take(&mut self.failure);
        (!failure.is_empty()).then(|| String::from_utf8_lossy(&failure).into_owned())
    }
}
