"""What the documentation is made with: drawings, reference tables, and the site's pages."""
