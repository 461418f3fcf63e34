//! Little-endian integers at fixed offsets of a header. It knows no format.

/// The `N` bytes at `offset`, if they are there.
pub fn bytes_at<const N: usize>(header: &[u8], offset: usize) -> Option<[u8; N]> {
    header.get(offset..)?.first_chunk().copied()
}

/// The 16-bit field at `offset`; 0 past the end.
pub fn u16_at(header: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes(bytes_at(header, offset).unwrap_or_default())
}

/// The 32-bit field at `offset`; 0 past the end.
pub fn u32_at(header: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes_at(header, offset).unwrap_or_default())
}

/// The 64-bit field at `offset`; 0 past the end.
pub fn u64_at(header: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes_at(header, offset).unwrap_or_default())
}
