//! Read-only documents that other parts of control add to the API, by path.

use serde_json::Value;
use std::{
    collections::HashMap,
    sync::{Arc, PoisonError, RwLock},
};

/// Makes the document anew for each request.
pub type Document = Box<dyn Fn() -> Value + Send + Sync>;

/// The documents. Clones share them.
#[derive(Clone, Default)]
pub struct Extra {
    documents: Arc<RwLock<HashMap<String, Document>>>,
}

impl Extra {
    /// Adds or replaces the document at a path.
    pub fn set(&self, path: &str, document: Document) {
        self.documents.write().unwrap_or_else(PoisonError::into_inner).insert(path.to_owned(), document);
    }

    /// The document at a path.
    pub fn get(&self, path: &str) -> Option<Value> {
        self.documents.read().unwrap_or_else(PoisonError::into_inner).get(path).map(|document| document())
    }
}
