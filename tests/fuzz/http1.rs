//! HTTP/1.1 in clear text through the whole proxy: no request is smuggled, lost or made up, and every one gets its own answer.

use kube_tunnel::proxy::detect::{Protocol, sniff};

use crate::double::{Exchange, METHOD, NUMBER, exchange};
use crate::message::{self, Message, Parsed};

/// Enough for any input in one piece.
const AT_ONCE: u64 = 1 << 16;

/// The input is what the client sends.
pub fn check(data: &[u8]) {
    if sniff(data) != Some(Protocol::Http1) {
        return;
    }
    let whole = exchange(data, AT_ONCE);
    let at_once = answers(&whole);
    if !whole.requests.is_empty() {
        compare(data, &whole.requests);
    }
    let pieces = exchange(data, 1 + data.len() as u64 % 13);
    let in_pieces = answers(&pieces);
    let same = pieces.requests == whole.requests && in_pieces == at_once;
    assert!(
        same || ends_early(&pieces, &in_pieces, &whole, &at_once),
        "it depends on how the client cut its bytes: {in_pieces:?} and at once {at_once:?}"
    );
}

/// Two ends of a connection depend on what had arrived by then. A head that is wrong and not finished is refused at once or given
/// up after the limit for headers, as hyper reads a head that came in part again only when its empty line is there. And a
/// request that the proxy answers without reading its body is the last one if the body has not come yet, or the last but one
/// if the next one has begun to come by then.
fn ends_early(pieces: &Exchange, in_pieces: &[Answer], whole: &Exchange, at_once: &[Answer]) -> bool {
    let missing = at_once.strip_prefix(in_pieces).unwrap_or_default();
    let refusal = matches!(missing, [Answer { own: true, status }] if status.starts_with('4'));
    let unread = in_pieces.iter().rev().take(2).any(|answer| answer.own);
    !missing.is_empty() && whole.requests.starts_with(&pieces.requests) && (refusal || unread)
}

/// What matters of an answer.
#[derive(Debug, PartialEq, Eq)]
struct Answer {
    status: String,
    /// Whether it is the proxy's, not the pod's.
    own: bool,
}

/// Reads the answers. Each one of the pod's belongs to one request, in their order.
fn answers(exchange: &Exchange) -> Vec<Answer> {
    let (mut rest, mut answers, mut numbers) = (&*exchange.answer, Vec::new(), Vec::new());
    while !rest.is_empty() {
        let (response, length) = response(rest);
        rest = &rest[length..];
        let status = response.start[1].clone();
        let number = response.all(NUMBER).first().map(|number| (*number).to_owned());
        numbers.extend(number.clone());
        if status == "101" && number.is_none() {
            return answers; // HTTP/2 from here on
        }
        if status == "100" {
            continue; // whether the body was waited for depends on what of it was there
        }
        let left = status == "101";
        answers.push(Answer {
            status,
            own: number.is_none(),
        });
        if left {
            break;
        }
    }
    let expected: Vec<_> = (0..exchange.requests.len())
        .map(|number| number.to_string())
        .collect();
    assert_eq!(numbers, expected, "requests of the pod and answers to the client");
    answers
}

/// Reads one response. Whether one of the proxy's own is to a HEAD request only shows in what follows it.
fn response(bytes: &[u8]) -> (Message, usize) {
    let to_head = |message: &Message| message.all(METHOD) == ["HEAD"];
    match message::response(bytes, to_head) {
        Ok(Parsed::Whole(response, length)) if !response.body.starts_with(b"HTTP/1.") => (response, length),
        _ => match message::response(bytes, |_| true) {
            Ok(Parsed::Whole(response, length)) => (response, length),
            Ok(Parsed::Partial) => panic!("an answer is cut off: {}", bytes.escape_ascii()),
            Err(wrong) => panic!("no answer, {wrong}: {}", bytes.escape_ascii()),
        },
    }
}

/// Where the client's bytes are requests by the strict reading, the pod's are among them, in order and unchanged.
fn compare(sent: &[u8], seen: &[Message]) {
    let (mut rest, mut expected) = (sent, Vec::new());
    loop {
        match message::request(rest) {
            Err(_) => return,
            Ok(Parsed::Partial) => break,
            Ok(Parsed::Whole(request, length)) => {
                rest = &rest[length..];
                if !request.all("upgrade").is_empty() {
                    return; // what follows may be no HTTP/1.1
                }
                expected.push(request);
            }
        }
    }
    let mut expected = expected.iter();
    for request in seen {
        assert!(
            expected.any(|sent| same(sent, request)),
            "the pod saw what was not sent: {request:?}"
        );
    }
}

fn same(sent: &Message, seen: &Message) -> bool {
    let ([method, target, _], [seen_method, seen_target, _]) = (&sent.start, &seen.start);
    // A fragment is no part of a target (RFC 9112 section 3.2).
    let target = target.split('#').next().unwrap_or_default();
    method == seen_method && (target == seen_target || !target.starts_with('/')) && sent.body == seen.body
}
