//! Bodies in Kubernetes' protobuf encoding.

use serde_json::Value;

use super::status::ApiError;

/// Decodes a body.
pub fn decode(_bytes: &[u8]) -> Result<Value, ApiError> {
    Err(ApiError::unsupported_media("protobuf bodies are not understood for this kind; send application/json"))
}
