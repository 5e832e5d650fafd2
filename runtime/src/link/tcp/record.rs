//! The records inside a yamux stream, which say what yamux itself cannot: how a direction ended, and that nobody reads
//! on. Pure.
//!
//! A record is a kind (8 bits) and a value (32 bits, big endian); behind [`Record::Data`] come as many bytes as it says.

/// Bytes of a record without its data.
pub(super) const HEAD: usize = 5;
/// The most data in one record: others have their turn between two of them.
pub(super) const MOST_DATA: usize = 16 * 1024;
/// Kinds from here on carry no data and are skipped by whoever does not know them.
const LATER: u8 = 128;

/// What one side says about a stream; about the link, on the first stream of the dialer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Record {
    /// So many bytes follow. On the link's stream: the reason of the [`Record::Close`] that follows.
    Data(u32),
    /// This direction has ended cleanly.
    End,
    /// This direction is broken off, for this reason; what was on its way is void.
    Reset(u32),
    /// The other direction is not read any more, for this reason.
    Stop(u32),
    /// The peer may send so many bytes more.
    Credit(u32),
    /// Everything up to the end has arrived.
    Got,
    /// The peer may have so many streams open at once.
    Streams(u32),
    /// So many bytes may be sent on each stream before there is credit for more.
    Window(u32),
    /// To be answered at once.
    Ping(u32),
    /// The answer, with the same value.
    Pong(u32),
    /// The link is closed with this code.
    Close(u32),
}

impl Record {
    pub(super) fn put(self, out: &mut Vec<u8>) {
        let (kind, value) = match self {
            Self::Data(bytes) => (0, bytes),
            Self::End => (1, 0),
            Self::Reset(code) => (2, code),
            Self::Stop(code) => (3, code),
            Self::Credit(bytes) => (4, bytes),
            Self::Got => (5, 0),
            Self::Streams(count) => (6, count),
            Self::Window(bytes) => (7, bytes),
            Self::Ping(token) => (8, token),
            Self::Pong(token) => (9, token),
            Self::Close(code) => (10, code),
        };
        out.push(kind);
        out.extend_from_slice(&value.to_be_bytes());
    }

    fn read(kind: u8, value: u32) -> Result<Option<Self>, Malformed> {
        Ok(Some(match kind {
            0 if value as usize > MOST_DATA => return Err(Malformed("a record with too much data")),
            0 => Self::Data(value),
            1 => Self::End,
            2 => Self::Reset(value),
            3 => Self::Stop(value),
            4 => Self::Credit(value),
            5 => Self::Got,
            6 => Self::Streams(value),
            7 => Self::Window(value),
            8 => Self::Ping(value),
            9 => Self::Pong(value),
            10 => Self::Close(value),
            LATER.. => return Ok(None),
            _ => return Err(Malformed("a record of an unknown kind")),
        }))
    }
}

/// The peer does not keep to the rules of the carrier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Malformed(pub(super) &'static str);

/// What comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Piece<'a> {
    /// A record; never [`Record::Data`].
    Record(Record),
    /// Bytes of data records.
    Bytes(&'a [u8]),
}

/// Takes records apart as they come.
#[derive(Debug, Default)]
pub(super) struct Parser {
    head: [u8; HEAD],
    have: usize,
    data: usize,
}

impl Parser {
    /// The next piece; takes it off the input. `None`: there is none in what is left.
    pub(super) fn next<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<Piece<'a>>, Malformed> {
        loop {
            if self.data > 0 && !input.is_empty() {
                let (bytes, rest) = input.split_at(self.data.min(input.len()));
                *input = rest;
                self.data -= bytes.len();
                return Ok(Some(Piece::Bytes(bytes)));
            }
            let (head, rest) = input.split_at((HEAD - self.have).min(input.len()));
            self.head[self.have..self.have + head.len()].copy_from_slice(head);
            self.have += head.len();
            *input = rest;
            if self.have < HEAD {
                return Ok(None);
            }
            self.have = 0;
            let [kind, value @ ..] = self.head;
            match Record::read(kind, u32::from_be_bytes(value))? {
                Some(Record::Data(bytes)) => self.data = bytes as usize,
                Some(record) => return Ok(Some(Piece::Record(record))),
                None => {}
            }
            if input.is_empty() {
                return Ok(None);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Record; 10] = [
        Record::End,
        Record::Reset(1),
        Record::Stop(2),
        Record::Credit(u32::MAX),
        Record::Got,
        Record::Streams(4),
        Record::Window(5),
        Record::Ping(6),
        Record::Pong(7),
        Record::Close(8),
    ];

    fn parse(input: &[u8], step: usize) -> Result<(Vec<Record>, Vec<u8>), Malformed> {
        let (mut parser, mut records, mut bytes) = (Parser::default(), Vec::new(), Vec::new());
        for mut part in input.chunks(step) {
            while let Some(piece) = parser.next(&mut part)? {
                match piece {
                    Piece::Record(record) => records.push(record),
                    Piece::Bytes(some) => bytes.extend_from_slice(some),
                }
            }
            assert!(part.is_empty());
        }
        Ok((records, bytes))
    }

    #[test]
    fn what_is_put_is_read_however_it_is_cut() {
        let mut wire = Vec::new();
        for record in ALL {
            record.put(&mut wire);
            Record::Data(3).put(&mut wire);
            wire.extend_from_slice(b"abc");
            // Of a later version.
            wire.extend_from_slice(&[200, 0, 0, 0, 9]);
        }
        for step in [1, 2, 3, 5, 7, 1000] {
            let (records, bytes) = parse(&wire, step).unwrap();
            assert_eq!(records, ALL, "{step}");
            assert_eq!(bytes, b"abc".repeat(ALL.len()));
        }
    }

    #[test]
    fn what_breaks_the_rules_is_refused() {
        assert!(parse(&[0, 0, 0, 0x40, 1], 5).is_err(), "more data than a record may have");
        assert!(parse(&[11, 0, 0, 0, 0], 5).is_err(), "no such kind");
    }
}
