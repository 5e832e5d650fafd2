//! A strict look at HTTP/1 on its way in, in front of hyper's parser.
//!
//! Two parsers that read one message differently are what request smuggling is made of. hyper takes what is merely
//! unusual (a bare line feed, a length given twice, a length beside chunks) and makes the best of it; a door between
//! strangers refuses it. What is refused here never reaches a parser, and the connection ends with it (RFC 9112, 2.2,
//! 5.1, 6.1 and 6.3).

/// Longest line in bytes; hyper's own bound on a whole head is as large.
const MAX_LINE: usize = 64 * 1024;
/// What follows the first line of HTTP/2's preface, in bytes.
const PREFACE_REST: u8 = 8;
/// Longest line with the size of a chunk in bytes.
const MAX_SIZE_LINE: usize = 1024;

/// Follows the framing of one connection's requests. It sees every byte once, and keeps at most one line.
#[derive(Debug, Default)]
pub(crate) struct Screen {
    at: At,
    line: Vec<u8>,
    head: Head,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum At {
    #[default]
    Head,
    /// In HTTP/2's preface, behind its first line (RFC 9113, 3.4).
    Preface(u8),
    /// In a body of known length.
    Body(u64),
    /// In the line before a chunk.
    Size,
    /// In a chunk.
    Chunk(u64),
    /// Behind a chunk.
    ChunkEnd,
    Trailers,
    /// What follows is not HTTP/1 any more, or is the last of it.
    Free,
}

/// What is known of the head that is being read.
#[derive(Debug, Default)]
struct Head {
    begun: bool,
    old: bool,
    connect: bool,
    upgrade: bool,
    length: Option<u64>,
    chunked: bool,
}

impl Screen {
    /// Whether a head has begun and is not whole.
    pub(crate) const fn in_head(&self) -> bool {
        match self.at {
            At::Head => self.head.begun || !self.line.is_empty(),
            At::Preface(_) => true,
            At::Body(_) | At::Size | At::Chunk(_) | At::ChunkEnd | At::Trailers | At::Free => false,
        }
    }

    /// Takes the next bytes.
    ///
    /// # Errors
    /// With the number of bytes before the line that is wrong.
    pub(crate) fn take(&mut self, data: &[u8]) -> Result<(), usize> {
        let mut rest = data;
        while !rest.is_empty() {
            let done = data.len() - rest.len();
            let used = match &mut self.at {
                At::Free => rest.len(),
                At::Preface(left) => {
                    let used = rest.len().min(usize::from(*left));
                    *left -= u8::try_from(used).unwrap_or(*left);
                    if *left == 0 {
                        self.at = At::Free;
                    }
                    used
                }
                At::Body(left) | At::Chunk(left) => {
                    let used = usize::try_from(*left).map_or(rest.len(), |left| left.min(rest.len()));
                    *left -= used as u64;
                    if *left == 0 {
                        self.at = if matches!(self.at, At::Chunk(_)) { At::ChunkEnd } else { At::Head };
                    }
                    used
                }
                At::Head | At::Size | At::ChunkEnd | At::Trailers => self.line(rest).ok_or(done)?,
            };
            rest = &rest[used..];
        }
        Ok(())
    }

    /// Takes a line or the beginning of one; `None` if it is wrong.
    fn line(&mut self, data: &[u8]) -> Option<usize> {
        let most = if self.at == At::Size { MAX_SIZE_LINE } else { MAX_LINE };
        let Some(end) = data.iter().position(|&b| b == b'\n') else {
            self.line.extend_from_slice(data);
            return (self.line.len() <= most).then_some(data.len());
        };
        let mut line = std::mem::take(&mut self.line);
        line.extend_from_slice(&data[..end]);
        let bare = line.strip_suffix(b"\r").filter(|line| line.len() <= most && !line.contains(&b'\r'))?;
        self.at = match self.at {
            At::Head => self.head.line(bare)?,
            At::Size => chunk_size(bare).map(|size| if size == 0 { At::Trailers } else { At::Chunk(size) })?,
            At::ChunkEnd => bare.is_empty().then_some(At::Size)?,
            At::Trailers if bare.is_empty() => At::Head,
            At::Trailers => field(bare).map(|_| At::Trailers)?,
            same @ (At::Preface(_) | At::Body(_) | At::Chunk(_) | At::Free) => same,
        };
        // The allocation serves the next line that comes in parts.
        line.clear();
        if line.capacity() <= MAX_SIZE_LINE {
            self.line = line;
        }
        Some(end + 1)
    }
}

impl Head {
    fn line(&mut self, line: &[u8]) -> Option<At> {
        match (self.begun, line.is_empty()) {
            // An empty line before a request is to be overlooked (RFC 9112, 2.2).
            (false, true) => {}
            (false, false) => {
                self.begun = true;
                self.old = line.ends_with(b"HTTP/1.0");
                self.connect = line.starts_with(b"CONNECT ");
                if line == b"PRI * HTTP/2.0" {
                    return Some(At::Preface(PREFACE_REST));
                }
            }
            (true, false) => self.field(line)?,
            (true, true) => return std::mem::take(self).body(),
        }
        Some(At::Head)
    }

    fn field(&mut self, line: &[u8]) -> Option<()> {
        let (name, value) = field(line)?;
        if name.eq_ignore_ascii_case(b"content-length") {
            let length = number(value, 10)?;
            self.length.replace(length).is_none().then_some(())
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            let fresh = !std::mem::replace(&mut self.chunked, true);
            (fresh && value.eq_ignore_ascii_case(b"chunked")).then_some(())
        } else {
            self.upgrade |= name.eq_ignore_ascii_case(b"upgrade");
            Some(())
        }
    }

    /// What follows the head.
    fn body(self) -> Option<At> {
        let (free, chunked, old) = (self.connect || self.upgrade, self.chunked, self.old);
        match self.length {
            Some(length) if chunked || (self.connect && length > 0) => None,
            None if chunked && (old || self.connect) => None,
            // After the head of an upgrade or CONNECT comes another protocol, or nothing: such a connection is closed
            // unless it is upgraded.
            _ if free => Some(At::Free),
            None if chunked => Some(At::Size),
            None | Some(0) => Some(At::Head),
            Some(length) => Some(At::Body(length)),
        }
    }
}

/// Name and value of a field line; `None` if it is a folded one, or none.
fn field(line: &[u8]) -> Option<(&[u8], &[u8])> {
    let colon = line.iter().position(|&b| b == b':')?;
    let (name, value) = (&line[..colon], &line[colon + 1..]);
    (!name.is_empty() && !name.iter().any(u8::is_ascii_whitespace)).then(|| (name, value.trim_ascii()))
}

fn chunk_size(line: &[u8]) -> Option<u64> {
    let size = line.split(|&b| b == b';').next()?;
    number(size, 16)
}

fn number(digits: &[u8], radix: u32) -> Option<u64> {
    let plain = !digits.is_empty() && digits.len() <= 16 && digits.iter().all(|b| char::from(*b).is_digit(radix));
    plain.then(|| std::str::from_utf8(digits).ok().and_then(|text| u64::from_str_radix(text, radix).ok()))?
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All at once and byte by byte must come to the same.
    fn takes(text: &[u8]) -> bool {
        let whole = Screen::default().take(text).is_ok();
        let mut slow = Screen::default();
        let parts = text.iter().all(|b| slow.take(&[*b]).is_ok());
        assert_eq!(whole, parts, "{}", String::from_utf8_lossy(text));
        whole
    }

    #[test]
    fn ordinary_requests_pass() {
        for text in [
            &b"GET / HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n"[..],
            b"\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
            b"POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\n\n\n\nGET / HTTP/1.0\r\n\r\n",
            b"POST / HTTP/1.1\r\nTransfer-Encoding: Chunked\r\n\r\n3;a=b\r\n\n\n\n\r\n0\r\nX: y\r\n\r\nGET / HTTP/1.1\r\n\r\n",
            b"CONNECT a:1 HTTP/1.1\r\n\r\n\x16\n\n\x00",
            b"GET / HTTP/1.1\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nany\nthing",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\n\n",
        ] {
            assert!(takes(text), "{}", String::from_utf8_lossy(text));
        }
    }

    #[test]
    fn ambiguous_requests_do_not() {
        for text in [
            &b"GET / HTTP/1.1\nHost: a\r\n\r\n"[..],
            b"GET / HTTP/1.1\r\nHost: a\n\r\n",
            b"GET / HTTP/1.1\r\nX: a\rb\r\n\r\n",
            b"GET / HTTP/1.1\r\nX: a\r\n b\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost : a\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost\r\n\r\n",
            b"POST / HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"POST / HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\n",
            b"POST / HTTP/1.1\r\nContent-Length: 3, 3\r\n\r\n",
            b"POST / HTTP/1.1\r\nContent-Length: +3\r\n\r\n",
            b"POST / HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
            b"POST / HTTP/1.1\r\nTransfer-Encoding: \x0bchunked\r\n\r\n",
            b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"CONNECT a:1 HTTP/1.1\r\nContent-Length: 3\r\n\r\n",
            b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\nabc",
            b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0x3\r\nabc",
            b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabcd\r\n",
            b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3 \r\nabc\r\n",
            b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: y\n\r\n",
        ] {
            assert!(!takes(text), "{}", String::from_utf8_lossy(text));
        }
    }

    #[test]
    fn what_stands_before_the_wrong_line_is_counted() {
        let text = b"POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\nabGET / HTTP/1.1\r\n\r\nGET / HTTP/1.1\n";
        assert_eq!(Screen::default().take(text), Err(text.len() - 15));
    }
}
