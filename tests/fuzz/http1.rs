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
    compare(data, &whole.requests, &at_once);
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

/// As far as the client's bytes are requests by the strict reading, the pod's are among them, in order and unchanged, and the first
/// of them is answered at least: the proxy may close after any answer, and what follows may be read in other ways.
fn compare(sent: &[u8], seen: &[Message], answers: &[Answer]) {
    let (mut rest, mut expected, mut is_all) = (sent, Vec::new(), true);
    while let Ok(Parsed::Whole(request, length)) = message::request(rest) {
        rest = &rest[length..];
        if !request.all("upgrade").is_empty() {
            is_all = false; // what follows may be no HTTP/1.1
            break;
        }
        expected.push(request);
    }
    is_all &= matches!(message::request(rest), Ok(Parsed::Partial));
    assert!(
        expected.is_empty() || !answers.is_empty(),
        "nobody answers {:?}",
        expected[0]
    );
    let count = expected.len();
    let mut expected = expected.iter();
    for request in seen.iter().take(if is_all { seen.len() } else { count }) {
        let found = expected.any(|sent| same(sent, request));
        // Beyond the strict part, anything may have come.
        assert!(found || !is_all, "the pod saw what was not sent: {request:?}");
        if !found {
            break;
        }
    }
}

/// Fields that are not the same behind the proxy, besides those that begin with `x-forwarded-`: they are about one connection, about
/// how the body is framed, or about the way here.
const OWN: [&str; 13] = [
    "connection",
    "content-length",
    "expect",
    "forwarded",
    "host",
    "http2-settings",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "via",
];

fn same(sent: &Message, seen: &Message) -> bool {
    let ([method, target, _], [seen_method, seen_target, _]) = (&sent.start, &seen.start);
    // A fragment is no part of a target (RFC 9112 section 3.2).
    let target = target.split('#').next().unwrap_or_default();
    let listed: Vec<_> = (sent.all("connection").into_iter())
        .flat_map(|list| list.split(','))
        .map(|name| name.trim().to_ascii_lowercase())
        .collect();
    let fields = |message: &Message| {
        let end_to_end = |(name, _): &&(String, String)| {
            !OWN.contains(&name.as_str()) && !name.starts_with("x-forwarded-") && !listed.contains(name)
        };
        message
            .fields
            .iter()
            .filter(end_to_end)
            .cloned()
            .collect::<Vec<_>>()
    };
    method == seen_method
        && (target == seen_target || !target.starts_with('/'))
        && fields(sent) == fields(seen)
        && sent.body == seen.body
}
