//! A request's headers as a proxy hands them over, read where they lie: no copy of each name and value.
//!
//! The layout is proxy-wasm's (ABI 0.2.1): the number of headers, for each the lengths of its name and its value, then
//! all names and values, each followed by a zero byte. Numbers have four bytes, the lowest first.

/// Headers in order, as they came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeaderMap {
    bytes: Vec<u8>,
    count: usize,
}

/// The bytes of a number.
const NUMBER: usize = 4;

impl HeaderMap {
    /// Takes over what the proxy wrote; `None` when it is not of the layout.
    pub fn new(bytes: Vec<u8>) -> Option<Self> {
        // A proxy without headers may write nothing at all.
        let count = if bytes.is_empty() { 0 } else { number(&bytes)?.0 };
        let map = Self { bytes, count };
        // Each is looked at once here, so that whoever goes through them later misses none.
        (map.iter().count() == count).then_some(map)
    }

    /// Copies headers from where a proxy has them; `None` when one is longer than the layout can say.
    pub fn copied<'h>(headers: impl ExactSizeIterator<Item = (&'h [u8], &'h [u8])> + Clone) -> Option<Self> {
        let count = headers.len();
        let text = |(name, value): (&[u8], &[u8])| name.len().saturating_add(value.len()).saturating_add(2);
        let texts = headers.clone().map(text).fold(0, usize::saturating_add);
        let numbers = count.saturating_mul(2).saturating_add(1).saturating_mul(NUMBER);
        let mut bytes = Vec::with_capacity(texts.saturating_add(numbers));
        bytes.extend(u32::try_from(count).ok()?.to_le_bytes());
        for (name, value) in headers.clone() {
            bytes.extend(u32::try_from(name.len()).ok()?.to_le_bytes());
            bytes.extend(u32::try_from(value.len()).ok()?.to_le_bytes());
        }
        for (name, value) in headers {
            for text in [name, value] {
                bytes.extend_from_slice(text);
                bytes.push(0);
            }
        }
        Some(Self { bytes, count })
    }

    /// Name and value of each.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        let after_count = self.bytes.get(NUMBER..).unwrap_or_default();
        let lengths = self.count.saturating_mul(2).saturating_mul(NUMBER);
        let (mut lengths, mut texts) = after_count.split_at_checked(lengths).unwrap_or_default();
        std::iter::from_fn(move || {
            let (name, rest) = number(lengths)?;
            let (value, rest) = number(rest)?;
            lengths = rest;
            Some((text(&mut texts, name)?, text(&mut texts, value)?))
        })
    }

    /// The value of the first header of that name, in lower case as proxies keep them; empty when there is none.
    pub fn value(&self, wanted: &str) -> &[u8] {
        self.iter().find(|(name, _)| *name == wanted.as_bytes()).map_or(&[], |(_, value)| value)
    }
}

fn number(bytes: &[u8]) -> Option<(usize, &[u8])> {
    let (number, rest) = bytes.split_first_chunk::<NUMBER>()?;
    Some((usize::try_from(u32::from_le_bytes(*number)).ok()?, rest))
}

fn text<'b>(texts: &mut &'b [u8], length: usize) -> Option<&'b [u8]> {
    let (text, rest) = texts.split_at_checked(length)?;
    let (_zero, rest) = rest.split_first()?;
    *texts = rest;
    Some(text)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Headers = Vec<(Vec<u8>, Vec<u8>)>;

    fn encode(headers: &Headers) -> Vec<u8> {
        let number = |length: usize| u32::try_from(length).unwrap().to_le_bytes();
        let mut bytes = number(headers.len()).to_vec();
        for (name, value) in headers {
            bytes.extend([number(name.len()), number(value.len())].concat());
        }
        for (name, value) in headers {
            bytes.extend([name, &[0][..], value, &[0]].concat());
        }
        bytes
    }

    fn all(map: &HeaderMap) -> Headers {
        map.iter().map(|(name, value)| (name.to_vec(), value.to_vec())).collect()
    }

    proptest! {
        #[test]
        fn headers_are_copied_as_they_are(headers: Headers) {
            let pairs = headers.iter().map(|(name, value)| (name.as_slice(), value.as_slice()));
            let copied = HeaderMap::copied(pairs).unwrap();
            prop_assert_eq!(all(&copied), headers.clone());
            prop_assert_eq!(copied, HeaderMap::new(encode(&headers)).unwrap());
        }
    }

    #[test]
    fn the_first_of_a_name_is_found() {
        let header = |name: &str, value: &[u8]| (name.as_bytes().to_vec(), value.to_vec());
        let headers = vec![header(":path", b"/"), header("x", b"\xff\0"), header("x", b"2"), header("", b"")];
        let map = HeaderMap::new(encode(&headers)).unwrap();
        assert_eq!(all(&map), headers);
        assert_eq!(
            (map.value("x"), map.value(":path"), map.value("y")),
            (&b"\xff\0"[..], &b"/"[..], &b""[..])
        );
        assert_eq!(HeaderMap::new(Vec::new()).unwrap().iter().count(), 0);
    }

    proptest! {
        #[test]
        fn what_was_written_is_read(headers in prop::collection::vec((prop::collection::vec(any::<u8>(), 0..9), prop::collection::vec(any::<u8>(), 0..20)), 0..9)) {
            let bytes = encode(&headers);
            prop_assert_eq!(all(&HeaderMap::new(bytes.clone()).unwrap()), headers);
            // What is cut off is no map, wherever it is cut.
            for end in 1..bytes.len() {
                prop_assert!(HeaderMap::new(bytes[..end].to_vec()).is_none());
            }
        }

        #[test]
        fn whatever_is_written_nothing_is_missed(bytes in prop::collection::vec(any::<u8>(), 0..200), count in 0u8..4) {
            let mut bytes = bytes;
            if bytes.len() >= 4 {
                bytes[..4].copy_from_slice(&[count, 0, 0, 0]);
            }
            if let Some(map) = HeaderMap::new(bytes.clone()) {
                prop_assert_eq!(map.iter().count(), if bytes.is_empty() { 0 } else { usize::from(count) });
            }
        }
    }
}
