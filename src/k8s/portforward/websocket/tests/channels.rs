//! Channels over a scripted connection.

use proptest::collection::vec;
use proptest::prelude::*;
use tokio::io::AsyncWriteExt;

use super::*;
use crate::k8s::portforward::websocket::channels::DATA;

/// The channels of a port.
pub(super) fn of(pieces: impl IntoIterator<Item = Vec<u8>>) -> WebSocket<Wire> {
    WebSocket::channels(Wire {
        pieces: pieces.into_iter().collect(),
        takes: vec![usize::MAX],
        ..Wire::default()
    })
}

/// A server's message on a channel.
fn message(channel: u8, payload: &[u8]) -> Vec<u8> {
    frame(FINAL | BINARY, &[&[channel], payload].concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn a_channels_data_is_what_comes_on_it_in_any_cut(
        messages in vec(vec(length(), 1..4), 0..6),
        failure in prop::option::of("[a-z]{1,300}"),
        cuts in sizes(),
        rooms in vec(prop_oneof![1usize..9, 100usize..70_000], 1..4),
    ) {
        let data: Vec<_> = messages.iter().map(|lengths| noise(lengths.iter().sum())).collect();
        let mut bytes = [message(1, &[80, 0]), message(0, &[80, 0])].concat();
        for (lengths, data) in messages.iter().zip(&data) {
            let mut rest = [&[0], &data[..]].concat();
            for (index, length) in lengths.iter().enumerate() {
                let opcode = if index == 0 { BINARY } else { CONTINUATION };
                let (last, length) = if index + 1 == lengths.len() {
                    (FINAL, rest.len())
                } else {
                    (0, *length)
                };
                bytes.extend(frame(opcode | last, &rest[..length]));
                rest.drain(..length);
            }
        }
        bytes.extend(failure.iter().flat_map(|text| message(1, text.as_bytes())));
        bytes.extend(close_frame(NORMAL, ""));
        let mut websocket = of(cut(&bytes, &cuts));
        let (seen, end) = block_on(read_all(&mut websocket, &rooms));
        prop_assert!(seen == data.concat());
        prop_assert_eq!(end.err().map(|error| error.to_string()), failure);
    }
}

#[tokio::test]
async fn why_a_port_refuses_is_the_error_of_its_connection() {
    let refusal = message(1, b"dial tcp4 127.0.0.1:80: connect: connection refused\n");
    let greetings = [message(0, &[80, 0]), message(1, &[80, 0])].concat();
    let mut websocket = of([[greetings, refusal, message(0, b"late")].concat()]);
    for _ in 0..2 {
        let error = websocket.read(&mut [0; 8]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        assert!(
            error.to_string().ends_with("connection refused"),
            "not a line: {error:?}"
        );
    }
    assert_eq!(
        unmask(&websocket.stream.written),
        [(CLOSE, NORMAL.to_be_bytes().to_vec())]
    );
}

#[tokio::test]
async fn a_channel_that_nobody_asked_for_is_refused() {
    let mut websocket = of([message(2, b"a")]);
    let error = websocket.read(&mut [0; 8]).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
}

#[tokio::test]
async fn what_is_written_goes_out_on_the_data_channel() {
    let mut websocket = of([]);
    let data = noise(70_000);
    websocket.write_all(&data).await.unwrap();
    websocket.flush().await.unwrap();
    let sent = unmask(&websocket.stream.written);
    assert!(
        sent.iter()
            .all(|(first, payload)| *first == FINAL | BINARY && payload[0] == DATA)
    );
    let sent: Vec<u8> = sent
        .into_iter()
        .flat_map(|(_, payload)| payload.into_iter().skip(1))
        .collect();
    assert!(sent == data);
}
