//! Reading and writing the binary formats: checked reads of little-endian numbers, and counts.

/// Bytes that cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Fewer bytes than announced.
    #[error("cut short")]
    CutShort,
    /// Bytes after the end.
    #[error("bytes after the end")]
    TrailingBytes,
    /// Another format, or another version of it.
    #[error("unknown format")]
    UnknownFormat,
    /// A count beyond its cap.
    #[error("a count beyond its limit")]
    TooMany,
}

/// Reads little-endian values off a slice; every read is checked.
#[derive(Debug)]
pub struct Reader<'b> {
    rest: &'b [u8],
}

impl<'b> Reader<'b> {
    /// A reader from the beginning of `bytes`.
    #[inline]
    pub fn new(bytes: &'b [u8]) -> Self {
        Self { rest: bytes }
    }

    /// The next `number` bytes.
    ///
    /// # Errors
    /// When there are fewer.
    #[inline]
    pub fn take(&mut self, number: usize) -> Result<&'b [u8], WireError> {
        let (head, rest) = self.rest.split_at_checked(number).ok_or(WireError::CutShort)?;
        self.rest = rest;
        Ok(head)
    }

    /// The next `N` bytes.
    ///
    /// # Errors
    /// When there are fewer.
    #[inline]
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (head, rest) = self.rest.split_first_chunk::<N>().ok_or(WireError::CutShort)?;
        self.rest = rest;
        Ok(*head)
    }

    /// The next byte.
    ///
    /// # Errors
    /// When there is none.
    #[inline]
    pub fn u8(&mut self) -> Result<u8, WireError> {
        self.array::<1>().map(|[byte]| byte)
    }

    /// The next 16-bit number.
    ///
    /// # Errors
    /// When it is cut short.
    #[inline]
    pub fn u16(&mut self) -> Result<u16, WireError> {
        self.array().map(u16::from_le_bytes)
    }

    /// The next 32-bit number.
    ///
    /// # Errors
    /// When it is cut short.
    #[inline]
    pub fn u32(&mut self) -> Result<u32, WireError> {
        self.array().map(u32::from_le_bytes)
    }

    /// The next 64-bit number.
    ///
    /// # Errors
    /// When it is cut short.
    #[inline]
    pub fn u64(&mut self) -> Result<u64, WireError> {
        self.array().map(u64::from_le_bytes)
    }

    /// The next 32-bit number, if it is at most `cap`.
    ///
    /// # Errors
    /// When it is cut short or larger.
    #[inline]
    pub fn capped(&mut self, cap: usize) -> Result<usize, WireError> {
        let number = usize::try_from(self.u32()?).unwrap_or(usize::MAX);
        if number > cap { Err(WireError::TooMany) } else { Ok(number) }
    }

    /// What was not read yet.
    #[inline]
    pub fn rest(&self) -> &'b [u8] {
        self.rest
    }

    /// The end.
    ///
    /// # Errors
    /// When there are bytes left.
    #[inline]
    pub fn end(&self) -> Result<(), WireError> {
        if self.rest.is_empty() { Ok(()) } else { Err(WireError::TrailingBytes) }
    }
}

/// A count or length as it is written. All that are written are capped far below 2^32.
pub fn count(number: usize) -> [u8; 4] {
    u32::try_from(number).unwrap_or(u32::MAX).to_le_bytes()
}
