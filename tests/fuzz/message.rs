//! HTTP/1.1 messages, read as strictly as RFC 9112 allows: by the pod that the proxy sends requests to, and by the client that
//! it answers. What another reader might take otherwise is an error here.

/// What a prefix of a stream is.
pub(crate) enum Parsed<T> {
    /// A whole message, and how many bytes it takes.
    Whole(T, usize),
    /// The beginning of one.
    Partial,
}

/// Why bytes are no message.
pub(crate) type Wrong = &'static str;

/// A message, with its fields in lower case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Message {
    /// The words of the first line.
    pub(crate) start: [String; 3],
    /// The fields in order.
    pub(crate) fields: Vec<(String, String)>,
    /// The body, without its framing.
    pub(crate) body: Vec<u8>,
}

impl Message {
    /// The values of a field.
    pub(crate) fn all(&self, name: &str) -> Vec<&str> {
        let fields = self.fields.iter().filter(|(field, _)| field == name);
        fields.map(|(_, value)| value.as_str()).collect()
    }
}

/// Reads a request.
pub(crate) fn request(bytes: &[u8]) -> Result<Parsed<Message>, Wrong> {
    let Some((mut message, length)) = head(bytes)? else {
        return Ok(Parsed::Partial);
    };
    let [method, target, version] = &message.start;
    if method.is_empty() || !method.bytes().all(is_token) {
        return Err("the method is no token");
    }
    if target.is_empty() || version != "HTTP/1.1" {
        return Err("the request line is not that of HTTP/1.1");
    }
    if message.all("host").len() != 1 {
        return Err("there is not exactly one Host field");
    }
    let framing = framing(&message)?.unwrap_or(Framing::Length(0));
    let Some((body, end)) = body(&bytes[length..], &framing)? else {
        return Ok(Parsed::Partial);
    };
    message.body = body;
    Ok(Parsed::Whole(message, length + end))
}

/// Reads a response, whose body is absent if `bodiless` says so of the head. One without a length goes on until the end.
pub(crate) fn response(
    bytes: &[u8],
    bodiless: impl FnOnce(&Message) -> bool,
) -> Result<Parsed<Message>, Wrong> {
    let Some((mut message, length)) = head(bytes)? else {
        return Ok(Parsed::Partial);
    };
    let [version, status, _] = &message.start;
    if !matches!(version.as_str(), "HTTP/1.1" | "HTTP/1.0") || status.len() != 3 {
        return Err("the status line is not that of HTTP/1");
    }
    let none = status.starts_with('1') || status == "204" || status == "304" || bodiless(&message);
    let framing = match framing(&message)? {
        _ if none => Framing::Length(0),
        Some(framing) => framing,
        None => Framing::Length(bytes.len() - length),
    };
    let Some((body, end)) = body(&bytes[length..], &framing)? else {
        return Ok(Parsed::Partial);
    };
    message.body = body;
    Ok(Parsed::Whole(message, length + end))
}

enum Framing {
    Length(usize),
    Chunked,
}

/// RFC 9112 section 6.3; both a length and a coding are refused, as a sender must not write both.
fn framing(message: &Message) -> Result<Option<Framing>, Wrong> {
    match (
        message.all("content-length").as_slice(),
        message.all("transfer-encoding").as_slice(),
    ) {
        ([], []) => Ok(None),
        ([length], []) if !length.is_empty() && length.bytes().all(|byte| byte.is_ascii_digit()) => length
            .parse()
            .map(|length| Some(Framing::Length(length)))
            .map_err(|_| "the length is beyond all bounds"),
        ([_], []) => Err("the length is no number"),
        ([], ["chunked"]) => Ok(Some(Framing::Chunked)),
        ([], [_]) => Err("the coding is not chunked"),
        _ => Err("there is more than one length"),
    }
}

fn body(bytes: &[u8], framing: &Framing) -> Result<Option<(Vec<u8>, usize)>, Wrong> {
    match framing {
        Framing::Length(length) => Ok(bytes.get(..*length).map(|body| (body.to_vec(), *length))),
        Framing::Chunked => chunks(bytes),
    }
}

/// RFC 9112 section 7.1, with the trailers left out of the result.
fn chunks(bytes: &[u8]) -> Result<Option<(Vec<u8>, usize)>, Wrong> {
    let (mut body, mut at) = (Vec::new(), 0);
    loop {
        let Some((line, length)) = line(&bytes[at..])? else {
            return Ok(None);
        };
        at += length;
        let digits = line.split(';').next().unwrap_or_default();
        if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err("the size of a chunk is no number");
        }
        let size =
            usize::from_str_radix(digits, 16).map_err(|_| "the size of a chunk is beyond all bounds")?;
        if size == 0 {
            break;
        }
        let Some(chunk) = bytes.get(at..at.saturating_add(size)) else {
            return Ok(None);
        };
        body.extend_from_slice(chunk);
        at += size;
        match bytes.get(at..at + 2) {
            Some(b"\r\n") => at += 2,
            Some(_) => return Err("a chunk does not end where it says"),
            None => return Ok(None),
        }
    }
    loop {
        let Some((line, length)) = line(&bytes[at..])? else {
            return Ok(None);
        };
        at += length;
        if line.is_empty() {
            return Ok(Some((body, at)));
        }
        field(&line)?;
    }
}

fn head(bytes: &[u8]) -> Result<Option<(Message, usize)>, Wrong> {
    let Some((first, mut at)) = line(bytes)? else {
        return Ok(None);
    };
    let mut words = first.splitn(3, ' ').map(str::to_owned);
    let mut message = Message {
        start: std::array::from_fn(|_| words.next().unwrap_or_default()),
        fields: Vec::new(),
        body: Vec::new(),
    };
    loop {
        let Some((line, length)) = line(&bytes[at..])? else {
            return Ok(None);
        };
        at += length;
        if line.is_empty() {
            return Ok(Some((message, at)));
        }
        message.fields.push(field(&line)?);
    }
}

/// A field line without folding or spaces before the colon (RFC 9112 section 5).
fn field(line: &str) -> Result<(String, String), Wrong> {
    let (name, value) = line.split_once(':').ok_or("a field has no colon")?;
    if name.is_empty() || !name.bytes().all(is_token) {
        return Err("the name of a field is no token");
    }
    Ok((
        name.to_ascii_lowercase(),
        value.trim_matches([' ', '\t']).to_owned(),
    ))
}

/// A line that ends with CRLF, without any control character but tab. Bytes above ASCII become the characters of Latin-1.
fn line(bytes: &[u8]) -> Result<Option<(String, usize)>, Wrong> {
    let control = |byte: &u8| (*byte < b' ' && *byte != b'\t') || *byte == 0x7f;
    let Some(end) = bytes.iter().position(control) else {
        return Ok(None);
    };
    match bytes.get(end..end + 2) {
        Some(b"\r\n") => {
            let text = bytes[..end].iter().map(|&byte| char::from(byte)).collect();
            Ok(Some((text, end + 2)))
        }
        None if bytes[end] == b'\r' => Ok(None),
        _ => Err("there is a control character or a bare end of line"),
    }
}

fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}
