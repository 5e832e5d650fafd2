//! Why edges are here no longer, or were not let in: what `meshctl why` goes by.

use std::{collections::VecDeque, sync::Arc};

use parking_lot::Mutex;
use proto::{api::Parting, code::CloseCode, message::BYE_MOVED};
use runtime::link::{EndCause, LinkEnd};

use crate::session::SessionEnd;

/// Partings that are kept until every replica of control has them; the oldest give way.
const KEPT: usize = 1024;
/// Longest detail in bytes.
const DETAIL: usize = 240;

/// The last partings, each with a number that grows.
#[derive(Clone, Debug, Default)]
pub struct Partings(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    count: u64,
    last: VecDeque<(u64, Parting)>,
}

impl Partings {
    /// Notes one.
    pub fn note(&self, mut parting: Parting) {
        let end = parting.detail.floor_char_boundary(DETAIL);
        parting.detail.truncate(end);
        let mut inner = self.0.lock();
        inner.count += 1;
        let number = inner.count;
        inner.last.push_back((number, parting));
        if inner.last.len() > KEPT {
            inner.last.pop_front();
        }
    }

    /// Those after a number, oldest first, and the number of the last one.
    #[must_use]
    pub fn after(&self, number: u64) -> (Vec<Parting>, u64) {
        let inner = self.0.lock();
        let after = inner.last.iter().filter(|(n, _)| *n > number).map(|(_, parting)| parting.clone());
        (after.collect(), inner.count)
    }
}

/// What is to be told of an end; `None` if the edge went elsewhere.
pub(crate) fn detail(end: &SessionEnd) -> Option<String> {
    match end {
        SessionEnd::Link(LinkEnd { cause: EndCause::Closed(code), .. }) if went_elsewhere(*code) => None,
        SessionEnd::Link(end) => Some(end.detail.clone()),
        SessionEnd::Bye(reason) => (reason != BYE_MOVED).then(|| reason.clone()),
        SessionEnd::Refused(refuse) => (!went_elsewhere(refuse.code)).then(|| refuse.reason.clone()),
    }
}

/// Whether a link that ends with this code goes on somewhere else.
const fn went_elsewhere(code: CloseCode) -> bool {
    match code {
        CloseCode::Redirected
        | CloseCode::Moved
        | CloseCode::Drained
        | CloseCode::Shutdown
        | CloseCode::Replaced
        | CloseCode::Done => true,
        CloseCode::DuplicateIdentity
        | CloseCode::Revoked
        | CloseCode::NameMismatch
        | CloseCode::ProtocolError
        | CloseCode::Expired
        | CloseCode::WrongRole
        | CloseCode::Overloaded
        | CloseCode::HelloTimeout => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reader_gets_what_it_has_not_seen_and_not_more_than_is_kept() {
        let partings = Partings::default();
        let parting = |at| Parting {
            edge: "shop-1".parse().unwrap(),
            shard: "s1".parse().unwrap(),
            at,
            cause: "timed-out".into(),
            detail: "ä".repeat(200),
            from: "192.0.2.1:1".into(),
        };
        assert_eq!(partings.after(0), (vec![], 0));
        partings.note(parting(1));
        let (first, seen) = partings.after(0);
        assert_eq!((first.len(), first[0].detail.len(), seen), (1, DETAIL, 1));
        assert_eq!(partings.after(seen).0, []);
        for at in 2..2000 {
            partings.note(parting(at));
        }
        let (rest, seen) = partings.after(seen);
        assert_eq!((rest.len(), rest.last().unwrap().at, seen), (KEPT, 1999, 1999));
    }
}
